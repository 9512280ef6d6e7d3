"""A recoverable-llava repo as a model of lmms-eval: batches, generation and log-likelihood, any number of GPUs.

    python -m lmms_eval --model recoverable_llava --tasks pope,gqa,mme --batch_size 16 \
        --model_args pretrained=FOLDER_OR_REPO,visual_token_budget=64
    accelerate launch --num_processes 4 -m lmms_eval ...

Every model argument that names a field of the configuration is set there, so that `compress=False` gives the row with
all tokens and `visual_token_budget=64` or `lof_threshold=2.0` any other. Mean tokens per image and the selector's time
are logged next to lmms-eval's throughput. The processor finds the question that guides, as in any other call.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.utils import Collator
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


class RecoverableLlavaForLmmsEval(lmms):
    """See the module's own text.

    Args:
        pretrained: folder or repo id.
        batch_size: questions at a time, per process.
        dtype: as in `from_pretrained`.
        device: where to run in a single process; several processes take one GPU each.
        settings: fields of the model's configuration.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else torch.device(device)
        self.batch_size = int(batch_size)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
        self.processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, trust_remote_code=trust_remote_code, dtype=dtype
        )
        self.model = model.to(self.device).eval()
        settings.pop("max_batch_size", None)
        for name, value in settings.items():
            if not hasattr(self.model.config, name):
                raise ValueError(f"model_args has {name}={value!r}, which is no field of the model's configuration.")
            setattr(self.model.config, name, value)
        self.meter = Meter(self.model.model)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results = []
        start, num_new = time.perf_counter(), 0
        ordered = Collator(
            [request.args for request in requests],
            lambda arguments: (-len(arguments[0]), arguments[0]),
            grouping=True,
        )
        with self._progress(len(requests)) as progress:
            for chunk in ordered.get_batched(n=self.batch_size):
                contexts, options, to_visual, doc_ids, tasks, splits = zip(*chunk, strict=True)
                visuals = [
                    visual(self.task_dict[task][split][doc])
                    for visual, doc, task, split in zip(to_visual, doc_ids, tasks, splits, strict=True)
                ]
                inputs = self._inputs(contexts, visuals)
                sequences = self.model.generate(**inputs, **generation_options(options[0]))
                new = sequences[:, inputs["input_ids"].shape[1] :]
                texts = self.processor.batch_decode(new, skip_special_tokens=True)
                lengths = (new != self.processor.tokenizer.pad_token_id).sum(1).tolist()
                for text, length in zip(texts, lengths, strict=True):
                    answer = until_stop(text, options[0].get("until", [])).strip()
                    results.append(GenerationResult(answer, TokenCounts(output_tokens=length)))
                num_new += sum(lengths)
                progress.update(len(chunk))
        self._log(time.perf_counter() - start, num_new)
        return ordered.get_original(results)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Of each continuation, the mean negative log-likelihood of its tokens (lmms-eval takes the lowest as the
        answer), and whether it is what greedy decoding would say.

        lmms-eval 0.7.3 turns a bare pair into a string before the task sees it; wrapped as here it arrives as it is.
        """
        results: list[GenerationResult] = []
        start = time.perf_counter()
        with self._progress(len(requests)) as progress:
            for number in range(0, len(requests), self.batch_size):
                chunk = [request.args for request in requests[number : number + self.batch_size]]
                contexts, visuals, continuations = [], [], []
                for context, target, to_visual, doc_id, task, split in chunk:
                    document = self.task_dict[task][split][doc_id]
                    contexts.append(context)
                    visuals.append(to_visual(document))
                    continuations.append(target if isinstance(target, str) else target(document))
                results += [GenerationResult(pair) for pair in self._score(contexts, visuals, continuations)]
                progress.update(len(chunk))
        self._log(time.perf_counter() - start, 0)
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Multi-round tasks of lmms-eval are not supported: use generate_until tasks.")

    @torch.inference_mode()
    def _score(
        self, contexts: list[str], visuals: list[list[Image.Image]], continuations: list[str]
    ) -> list[tuple[float, bool]]:
        inputs = self._inputs(contexts, visuals)
        targets = [
            self.processor.tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in continuations
        ]
        longest = max(map(len, targets))
        padding = self.processor.tokenizer.pad_token_id
        rows = [ids + [padding] * (longest - len(ids)) for ids in targets]
        ids = torch.tensor(rows, device=self.device)
        is_target = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in targets], device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_target], dim=1)
        logits = self.model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        likelihood = logits.log_softmax(-1).gather(2, ids[:, :, None]).squeeze(2)
        means = -(likelihood * is_target).sum(1) / is_target.sum(1).clamp(min=1)
        greedy = ((logits.argmax(-1) == ids) | (is_target == 0)).all(1)
        return list(zip(means.tolist(), greedy.tolist(), strict=True))

    def _inputs(self, contexts: tuple[str, ...] | list[str], visuals: list[list[Image.Image]]) -> dict[str, Any]:
        chats = []
        for context, pictures in zip(contexts, visuals, strict=True):
            images = [{"type": "image", "image": picture.convert("RGB")} for picture in pictures or []]
            text = {"type": "text", "text": context.replace(self.processor.image_token, "").strip()}
            chats.append([{"role": "user", "content": [*images, text]}])
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return dict(inputs)

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="recoverable_llava")

    def _log(self, seconds: float, num_new: int) -> None:
        facts = {"total_requests": self.meter.num_calls, **self.meter.facts()}
        log_metrics(seconds, num_new, num_new / max(seconds, 1e-9), facts)


class Meter:
    """Counts tokens per image and times their choice, by standing in front of the model's two steps of choosing."""

    def __init__(self, model: Any) -> None:
        self.num_calls, self.num_images, self.num_tokens, self.seconds = 0, 0, 0, 0.0
        model.select = self._timed(model.select, self._count)
        model.assemble = self._timed(model.assemble, lambda assembly: None)

    def facts(self) -> dict[str, float]:
        if not self.num_images:
            return {}
        return {
            "mean_visual_tokens": self.num_tokens / self.num_images,
            "selector_milliseconds_per_image": 1000 * self.seconds / self.num_images,
        }

    def _timed(self, step: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            _synchronize()
            start = time.perf_counter()
            result = step(*args, **kwargs)
            _synchronize()
            self.seconds += time.perf_counter() - start
            then(result)
            return result

        return timed

    def _count(self, selection: Any) -> None:
        self.num_calls += 1
        self.num_images += len(selection.num_tokens)
        self.num_tokens += int(selection.num_tokens.sum())


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as those of `generate`; greedy unless a temperature is set."""
    result: dict[str, Any] = {"max_new_tokens": options.get("max_new_tokens", 128)}
    result["num_beams"] = options.get("num_beams", 1)
    if options.get("temperature", 0):
        return {**result, "do_sample": True, "temperature": options["temperature"], "top_p": options.get("top_p")}
    return {**result, "do_sample": False}


def until_stop(text: str, stops: str | list[str]) -> str:
    """The text up to the first of the stop strings."""
    for stop in _as_list(stops):
        text = text.split(stop)[0] if stop else text
    return text


def _as_list(value: str | list[str]) -> Iterator[str]:
    yield from [value] if isinstance(value, str) else value


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
