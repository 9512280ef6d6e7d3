"""A task for lmms-eval that needs no download: scenes of the embedded checkpoint's recipe.

    python -m evaluation.lmms_eval_tasks FOLDER --images 50
    python -m lmms_eval --include_path FOLDER --tasks scenes,scenes_choice --model recoverable_llava \
        --model_args pretrained=checkpoints/tiny --batch_size 16 --output_path FOLDER/output

`scenes` generates answers, `scenes_choice` ranks the letters of multiple choice by log-likelihood.
"""
