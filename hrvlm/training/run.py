"""Train or fine-tune a vision-language model: what ``hrvlm train`` runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.config import DataConfig
from ..data.sources import RowSource, open_source
from ..encoder.plain_modules import cast_parameters
from ..files import folder_for_results, write_text
from ..inference.loading import check_model_type, quiet_loading
from ..machine import torch_dtype
from ..vlm.processors import VLMProcessor
from ..vlm.tokenizer import get_tokenizer
from ..vlm.vision_language_model import VisionLanguageModel
from .adapters import quantization, with_adapters
from .collators import VQACollator
from .config import ModelConfig, TrainingConfig
from .samples import REPORT_FILE, SKIPS_FILE, SampleMaker, write_report
from .sequence_packing import PackedSequenceCollator
from .stream import RowDataset, SampleStream
from .trainer import VLMTrainer, VLMTrainingArguments, is_whole

CONFIG_FILE = "train.yaml"


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        output_dir: Where the model, its processor, checkpoints and the data report are.
        steps: Optimizer steps in all, those before a resume included.
        metrics: Trainer's, of training and of the last evaluation.
        skipped: Rows left out, by reason.
        is_main: Whether this process is the one that reports.
    """

    output_dir: str
    steps: int
    metrics: dict[str, float]
    skipped: dict[str, int]
    is_main: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: value for name, value in asdict(self).items() if name != "is_main"}


def train(config: TrainingConfig, *, resume: bool = False) -> TrainResult:
    """Train by a configuration; the trained model is in its ``output_dir``.

    Args:
        config: The run.
        resume: Go on from the last checkpoint in ``output_dir``, or begin if there is none.

    Raises:
        ValueError: a value does not fit, ``output_dir`` holds a run and `resume` is not given, or
            no row of the data could be used.
        OSError: a file is missing.
    """
    args = training_arguments(config)
    with folder_for_results(Path(str(args.output_dir))):
        return _train(config, args, resume)


def _train(config: TrainingConfig, args: VLMTrainingArguments, resume: bool) -> TrainResult:
    output_dir = Path(str(args.output_dir))
    checkpoint = checkpoint_to_resume(output_dir, resume)
    set_seed(args.seed)
    with quiet_loading(config.model.path):
        model, processor = _model_to_train(config, args)
    trainer = make_trainer(config, args, model, processor)
    main = trainer.is_world_process_zero()
    if main:
        if resume and checkpoint is None:
            print(f"{output_dir} has no checkpoint yet: beginning at step 0", file=sys.stderr)
        if checkpoint is None:
            (output_dir / SKIPS_FILE).unlink(missing_ok=True)
        write_config(config, output_dir)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.has_learned is False:
        reasons = write_report(output_dir)["skipped"] if main else {}
        raise ValueError(
            f"data.train: no row could be used {reasons}; {output_dir / REPORT_FILE} names them"
        )
    metrics = dict(result.metrics)
    if checkpoint is not None:
        # Later releases of transformers divide by the steps that were run themselves.
        divided = hasattr(trainer, "_initial_global_step")
        start, end = step_of(checkpoint), trainer.state.global_step
        metrics = of_steps_run(metrics, 0 if divided and start < end else start, end)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    trainer.save_model()
    if not main:
        return TrainResult(str(output_dir), trainer.state.global_step, metrics, {}, False)
    trainer.save_state()
    report = write_report(output_dir)
    return TrainResult(str(output_dir), trainer.state.global_step, metrics, report["skipped"], True)


def _model_to_train(config: TrainingConfig, args: VLMTrainingArguments) -> tuple[Any, VLMProcessor]:
    """The model, with adapters where these are what is trained."""
    lora, base = config.lora, config.model.path
    if lora is None or base is None:
        return load_model(config.model)
    options = {}
    if lora.four_bit:
        options = quantization(torch.bfloat16 if args.bf16 else torch.float32, args.device)
    model, processor = load_model(config.model, **options)
    checkpointing = bool(args.gradient_checkpointing)
    return with_adapters(model, lora, base, checkpointing=checkpointing), processor


def of_steps_run(metrics: dict[str, float], start: int, end: int) -> dict[str, float]:
    """Trainer's metrics of a resumed run, which divide by the steps before the resume too.

    Args:
        metrics: Of a run that went on from step `start`.
        start: Steps before.
        end: Steps in all.
    """
    run = end - start
    means = ("train_loss", "train_samples_per_second", "train_steps_per_second")
    if run == 0:
        return {name: value for name, value in metrics.items() if name not in means}
    share = {"train_loss": end / run}
    return {
        name: value * share.get(name, run / end) if name in means else value
        for name, value in metrics.items()
    }


def training_arguments(config: TrainingConfig) -> VLMTrainingArguments:
    """The section `training`, with what it leaves open.

    Raises:
        ValueError: as :class:`~hrvlm.training.trainer.VLMTrainingArguments`; a value is of a wrong
            type.
    """
    given = {name: _as_meant(name, value) for name, value in config.training.items()}
    loggers = [name for name in ("tensorboard", "wandb") if find_spec(name) is not None]
    given.setdefault("report_to", loggers)
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    if not config.data.eval and given.get("eval_strategy", "no") != "no":
        raise ValueError(f"training.eval_strategy={given['eval_strategy']!r} needs data.eval")
    try:
        return VLMTrainingArguments(**given)
    except TypeError as error:
        raise ValueError(f"training: {error}") from error


def _as_meant(name: str, value: Any) -> Any:
    """YAML takes `no` for False."""
    return "no" if value is False and name.endswith("_strategy") else value


def load_model(config: ModelConfig, **options: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    """The model to start from, with its processor.

    Args:
        config: Which.
        **options: Of ``from_pretrained``, for a model by its path.

    Raises:
        ValueError: the checkpoint is of another kind.
    """
    dtype = torch_dtype(config.dtype)
    if config.path is not None:
        check_model_type(config.path, "hrvlm")
        model = VisionLanguageModel.from_pretrained(config.path, dtype=dtype, **options)
        processor = VLMProcessor.from_pretrained(config.path)
    elif config.vision is not None and config.language is not None:
        tokenizer = get_tokenizer(
            str(config.tokenizer),
            config.options.get("vlm_extra_tokens"),
            config.options.get("lm_chat_template"),
        )
        model = VisionLanguageModel.from_backbones(
            config.vision,
            config.language,
            tokenizer,
            dtype=dtype,
            lm_tokenizer=config.tokenizer,
            **config.options,
        )
        processor = VLMProcessor.from_config(model.config, tokenizer)
    else:
        model, processor = _random_model(config.names, dtype)
    if config.allow_fp16:
        model.config.allow_fp16 = True
    if config.attn_implementation is not None:
        model.decoder.set_attn_implementation(config.attn_implementation)
    return model, processor


def make_trainer(
    config: TrainingConfig, args: VLMTrainingArguments, model: Any, processor: Any
) -> VLMTrainer:
    """The trainer of a run, with its data.

    Raises:
        ValueError: a length does not fit the model's context, or the data needs ``max_steps``.
    """
    data, output_dir = config.data, Path(str(args.output_dir))
    context = model.config.lm_max_position_embeddings
    for name in ("max_sample_length", "sequence_packing"):
        value = getattr(data, name)
        if value is not None and context is not None and value > context:
            raise ValueError(f"data.{name}={value}: the language model's context holds {context}")
    attention = model.decoder.config._attn_implementation
    if data.sequence_packing and "flash" in attention and args.per_device_train_batch_size > 1:
        raise ValueError(
            f"attn_implementation={attention!r} keeps packed samples apart in batches of one row "
            "only: set training.per_device_train_batch_size=1 (and longer rows), or use sdpa"
        )
    lengths = [n for n in (data.max_sample_length, data.sequence_packing, context) if n is not None]
    make = SampleMaker(processor, min(lengths, default=None), output_dir, fetch=data.fetch)
    train_data = training_set(data, make, args.seed)
    if isinstance(train_data, SampleStream) and args.max_steps <= 0:
        raise ValueError(
            "training.max_steps is needed: streamed, drawn, weighted and packed data has no epochs"
        )
    if isinstance(train_data, RowDataset) and not train_data.sources[0].shuffle:
        args.train_sampling_strategy = "sequential"
    eval_data = None
    if data.eval:
        eval_data = RowDataset([open_source(s, indexed=True) for s in data.eval], make)
    packing = data.sequence_packing
    collator = VQACollator(processor) if packing is None else _PackedOrNot(processor, packing)
    return VLMTrainer(
        model,
        args,
        callbacks=[_ReportCallback()],
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
    )


def training_set(data: DataConfig, make: SampleMaker, seed: int) -> RowDataset | SampleStream:
    """The training data: by index where all of it can be, else an endless stream.

    Raises:
        ValueError: some sources are shuffled and others not, in data by index.
    """
    sources = [open_source(source) for source in data.train]
    weights = [source.weight for source in data.train]
    by_index = all(isinstance(source, RowSource) for source in sources)
    if by_index and data.sequence_packing is None and not any(weights):
        if len({source.shuffle for source in sources}) > 1:
            raise ValueError("data.train: `shuffle` has to be the same for all sources by index")
        return RowDataset(sources, make)
    return SampleStream(
        sources,
        make,
        weights=[1.0 if weight is None else float(weight) for weight in weights],
        seed=seed,
        packing=data.sequence_packing,
    )


class _ReportCallback(TrainerCallback):
    """Keeps the report on the data as young as the last checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_report(Path(args.output_dir))


class _PackedOrNot:
    """Packed rows in training; evaluation has one sample a row."""

    def __init__(self, processor: Any, length: int):
        self.packed, self.plain = PackedSequenceCollator(processor, length), VQACollator(processor)

    def __call__(self, samples: Any) -> dict[str, torch.Tensor]:
        packed = any(sample is not None and "position_ids" in sample for sample in samples)
        return (self.packed if packed else self.plain)(samples)


def _random_model(
    names: Mapping[str, Any], dtype: torch.dtype
) -> tuple[VisionLanguageModel, VLMProcessor]:
    from ..vlm.config import VLMConfig

    tokenizer = get_tokenizer(
        names["lm_tokenizer"], names.get("vlm_extra_tokens"), names.get("lm_chat_template")
    )
    names = {"lm_vocab_size": len(tokenizer)} | dict(names)
    config = VLMConfig.from_names(names | {"image_token_id": tokenizer.image_token_id})
    text = config.text_config
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    text.bos_token_id = tokenizer.bos_token_id
    model = VisionLanguageModel(config)
    cast_parameters(model, dtype)
    return model, VLMProcessor.from_config(config, tokenizer)


def last_checkpoint(directory: Path) -> Path | None:
    """The last checkpoint that was written to its end; a kill may have cut off a later one."""
    found = [
        path
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit() and is_whole(path)
    ]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(directory: Path, resume: bool) -> Path | None:
    """The last checkpoint of a directory; None if there is none, and a run begins.

    Raises:
        ValueError: there is one, and `resume` is not given.
    """
    checkpoint = last_checkpoint(directory)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{directory} holds a run ({checkpoint.name}): --resume goes on with it; or give "
            "another training.output_dir"
        )
    return checkpoint


def write_config(config: TrainingConfig, directory: Path) -> None:
    """Keep the configuration with the run, overrides included."""
    write_text(directory / CONFIG_FILE, yaml.safe_dump(dict(config.sections), sort_keys=False))
