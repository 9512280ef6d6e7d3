"""Gives each folder in checkpoints/ the Python files that its auto_map reaches, byte for byte those of the package.

`make checkpoint-code` runs it; tests/recoverable_llava/test_checkpoint.py tells when it must run.
"""

import shutil
from pathlib import Path

from hub_upload.inspection import built_auto_map
from hub_upload.remote_code import executed_files, package_folder


ROOT = Path(__file__).parents[1]


def main(checkpoints: Path = ROOT / "checkpoints") -> None:
    for folder in sorted(path.parent for path in checkpoints.glob("*/config.json")):
        wanted = executed_files(package_folder(), built_auto_map(folder))
        for file in folder.glob("*.py"):
            file.unlink()
        for name in wanted:
            shutil.copyfile(package_folder() / name, folder / name)
        print(f"{folder.name}: {len(wanted)} files")


if __name__ == "__main__":
    main()
