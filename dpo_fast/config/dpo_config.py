"""The options of a training run: transformers' `TrainingArguments` plus what preference optimization needs.

Names and defaults are those of TRL 1.16's `DPOConfig`, so that a configuration written for it works unchanged. Defaults
that differ from `TrainingArguments` are `learning_rate`, `logging_steps`, `gradient_checkpointing`, `bf16` (see its
help) and `logging_nan_inf_filter`.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from transformers import TrainingArguments

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.config.rules import (
    NARROWER_TYPES,
    check_evaluation,
    check_loss,
    check_parallelism,
    check_surroundings,
    settle_layer_kernels,
)
from dpo_fast.config.types import Count, NotNegative, check_types
from dpo_fast.errors import InputError, input_of
from dpo_fast.losses import SMOOTHED, FDivergence, LossParameters, uses

TruncationMode = Literal["keep_start", "keep_end"]
LayoutChoice = Literal["auto", "shared", "padded"]
CoupleChoice = Literal["step", "micro_batch"]
LayerKernelsChoice = Literal["auto", "compile", "liger", "none"]

_CPU_TOKENS = 2048  # of a pack: more are hardly faster, and take twice the memory


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`; the fields of `transformers.TrainingArguments` are all here too.

    Every own field explains itself in its `help`, which `dpo-fast train --help_all` prints. Units: `max_length` and
    `max_tokens_per_micro_batch` are tokens; `per_device_train_batch_size` counts preference groups, a pair being one.

    Raises:
        ValueError: a value is out of range. The message names the field, the value, what is allowed and what to do.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Other defaults than TrainingArguments.
    learning_rate: NotNegative = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: NotNegative = field(
        default=10,
        metadata={"help": "Steps between two log lines; below 1, a fraction of all steps."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace a loss that is not finite by the running average in the log. Off by default: it hides "
            "divergence, and its check makes the host wait for the device in every step."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, about a fifth more time. Unset, it is on "
            "where those of the largest micro-batch do not fit, for streams, and under FSDP and DeepSpeed."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16. Unset, it is on when training runs on a GPU that supports bfloat16 "
            "and fp16 is off, else off: CPUs train in fp32 unless given use_cpu and bf16. TRL turns it on "
            "everywhere."
        },
    )
    remove_unused_columns: bool = field(
        default=True,
        metadata={"help": "Accepted and without effect: the trainer picks the columns that it needs itself."},
    )

    # Model.
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of AutoModelForCausalLM.from_pretrained, used when the model is given by name or path. "
            "On the command line a JSON object."
        },
    )
    allow_missing_weights: bool = field(
        default=False,
        metadata={
            "help": "Load a model by name although its checkpoint, or its adapter's folder, lacks weights or holds "
            "others: they are random, or left out. Off, such a model is refused."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Allow models and tokenizers that bring their own Python code from the Hub."},
    )
    router_aux_loss_coef: NotNegative | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. Unset, the model's configuration "
            "decides; 0 turns it off."
        },
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout probability of policy and reference to 0."}
    )

    # Data.
    dataset_num_proc: Count | None = field(
        default=None,
        metadata={"help": "Processes that tokenise the dataset."},
    )
    max_length: Annotated[int, Ge(2), Lt(2**31)] | None = field(
        default=1024,
        metadata={
            "help": "Most tokens of prompt and completion together; longer ones are cut. None cuts nothing. At most as "
            "many as a model with learned positions (GPT-2, OPT, …) has."
        },
    )
    truncation_mode: TruncationMode = field(
        default="keep_start",
        metadata={"help": "Which end survives when prompt and completion exceed max_length."},
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Columns of the dataset with other names than ours, as prompt=instruction chosen=better. Where "
            "prompt is given, no other column belongs to the prompt; system=… makes conversations of text."
        },
    )
    comparisons: ComparisonChoice = field(
        default="all_pairs",
        metadata={
            "help": "Which comparisons a row of K completions with scores or ranks yields: 'all_pairs' of different "
            "scores, 'best_vs_rest' the best against each other one, 'best_vs_worst' those two alone. Pairs and "
            "comparisons that the data list stay as given."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Merge rows with the same prompt into one preference group, so that the prompt runs once for all "
            "of their completions. A batch counts groups, so it then holds more comparisons."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Accepted and without effect: the shared layout never pads, whatever the attention backend."},
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={
            "help": "Accepted and without effect: the shared layout never pads, the padded one to its longest row."
        },
    )

    # Reference.
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Accepted and without effect: reference log-probs are always computed up front, once, and kept in "
            "the reference store."
        },
    )
    precompute_ref_batch_size: Count | None = field(
        default=None,
        metadata={
            "help": "Accepted and without effect: the reference pass packs groups up to max_tokens_per_micro_batch, "
            "or 8192 tokens where that is unset, 32768 on CUDA."
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the reference store. Unset, the user's cache folder (dpo-fast doctor prints it)."},
    )

    # Loss.
    beta: float = field(
        default=0.1,
        metadata={"help": "How strongly the policy is held to the reference; larger holds it closer. τ of IPO."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Loss, or several that are added with loss_weights: the names in dpo_fast.losses.LOSSES. In Python "
            "also a function like those there."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each loss type. Unset, all weigh 1."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a preference label is flipped, in [0, 0.5). Means something to the losses "
            f"{', '.join(name for name in SMOOTHED if name != 'exo_pair')} and exo_pair, which needs it above 0."
        },
    )
    f_divergence_type: FDivergence = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence from the reference that is bounded: reverse_kl, forward_kl, js_divergence or "
            "alpha_divergence. Means nothing to sft and to losses without a reference, and does not go with aot."
        },
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "α of the α-divergence; 1 is the reverse KL."}
    )
    use_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weigh every comparison by how likely the policy is to write its two completions (WPO); with any "
            "loss."
        },
    )
    ld_alpha: Annotated[float, Ge(0), Le(1)] | None = field(
        default=None,
        metadata={
            "help": "Weight α in [0, 1] of the tokens by which a completion is longer than the one it is compared with "
            "(LD-DPO); with any loss. Unset, all tokens weigh alike, as with 1."
        },
    )
    couple: CoupleChoice = field(
        default="step",
        metadata={
            "help": "What aot and aot_unpaired sort together, and beta_dpo takes the mean of: the comparisons of the "
            "whole optimizer step, over micro-batches and ranks, or those of a 'micro_batch', as TRL does."
        },
    )
    rpo_alpha: NotNegative | None = field(
        default=None,
        metadata={"help": "Adds the loss nll, the winners' mean negative log-likelihood, with this weight (RPO)."},
    )
    simpo_gamma: float = field(
        default=0.5,
        metadata={"help": "Margin γ of the loss simpo, which the paper uses with a beta of 2 to 2.5."},
    )
    beta_dpo_alpha: float = field(
        default=0.6,
        metadata={"help": "How far β of the loss beta_dpo follows a step's margins, 0 or more; 0 leaves it at beta."},
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature τ of the loss discopop, above 0."})

    # Speed and memory.
    layout: LayoutChoice = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: 'shared' packs without padding and runs each prompt once, 'padded' is "
            "the usual rows and works for every architecture, 'auto' takes 'shared' where the model allows it."
        },
    )
    max_tokens_per_micro_batch: Count | None = field(
        default=None,
        metadata={
            "help": "Bound on the packed tokens of one forward and backward pass. A step's groups are split under it; "
            "the gradients stay those of the whole batch. Unset, it is 2048 on a CPU, where longer packs are "
            "hardly faster, but for losses that couple packs; a GPU has none."
        },
    )
    layer_kernels: LayerKernelsChoice = field(
        default="auto",
        metadata={
            "help": "What fuses a model's norms, activations and rotary products: 'compile', which is torch_compile, "
            "one layer for all; 'liger', the kernels of liger-kernel without its head (also liger_kernel_config); or "
            "'none'. 'auto' is 'none' until one of them is measured to be faster on a GPU."
        },
    )
    log_completion_statistics: bool = field(
        default=True,
        metadata={"help": "Also log entropy, logits/chosen, logits/rejected and mean_token_accuracy."},
    )

    resume_changed: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What may differ from the run that wrote the checkpoint of resume_from_checkpoint, by name as the "
            "refusal lists it: beta learning_rate. What is new holds from there on, optimizer and schedule included; "
            "the schedule and the data go on at the checkpoint's step. Another optimizer begins with an empty state."
        },
    )

    def __post_init__(self) -> None:
        self.loss_type = [*self.loss_type] if isinstance(self.loss_type, list | tuple) else [self.loss_type]
        self.columns = _column_names(self.columns)
        check_types(self, NARROWER_TYPES)
        check_loss(self)
        check_evaluation(self)
        self.pad_to_multiple_of = _pad_multiple(self.pad_to_multiple_of)
        self.remove_unused_columns = False
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _gpu_supports_bf16()
        wanted = self.gradient_checkpointing, getattr(self, "activation_checkpointing", None)
        self.recompute_where_needed = wanted == (None, None)  # then the trainer decides
        if self.recompute_where_needed and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # as transformers where activations are recomputed
        # transformers renamed the field and warns about the old name; 5.17 knows only the old one.
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        settle_layer_kernels(self)
        with input_of("options of training", "dpo-fast train --help_all explains each"):
            super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # else a copy holds the host up anyway
        check_parallelism(self)
        check_surroundings(self)
        coupled = any(uses(name, "step") for name in self.loss_mix)  # several packs cost another forward pass then
        if self.max_tokens_per_micro_batch is None and self.device.type == "cpu" and not coupled:
            self.max_tokens_per_micro_batch = _CPU_TOKENS

    @property
    def splits_completions(self) -> bool:
        """Whether completions are split where others that they are compared with end (LD-DPO)."""
        return self.ld_alpha is not None

    @property
    def loss_parameters(self) -> LossParameters:
        """What the losses are tuned by."""
        return LossParameters(**{field.name: getattr(self, field.name) for field in fields(LossParameters)})

    @property
    def loss_mix(self) -> dict[str, float]:
        """Weight of every loss by its name, with what `rpo_alpha` adds."""
        mix: dict[str, float] = {}
        weights = [1.0] * len(self.loss_type) if self.loss_weights is None else self.loss_weights
        for name, weight in [*zip(self.loss_type, weights, strict=True), ("nll", self.rpo_alpha or 0.0)]:
            mix[name] = mix.get(name, 0.0) + weight
        return {name: weight for name, weight in mix.items() if weight or name != "nll"}


def _pad_multiple(value: int | str | None) -> int | None:
    """The command line passes numbers as text."""
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise InputError(f"pad_to_multiple_of={value!r} must be an integer of at least 1, 'auto' or None; try 8.")
    return int(value)


def _column_names(value: dict[str, str] | list[str] | str | None) -> dict[str, str] | None:
    """Return a mapping; the command line passes a list of texts a=b."""
    pairs = [value] if isinstance(value, str) else value
    if isinstance(pairs, list) and all(isinstance(pair, str) and "=" in pair for pair in pairs):
        pairs = dict(pair.split("=", 1) for pair in pairs)
    if pairs is not None and (
        not isinstance(pairs, dict)
        or not all(isinstance(text, str) and text for pair in pairs.items() for text in pair)
    ):
        raise InputError(
            f"columns={value!r} must map our names of columns to those of the dataset: --columns prompt=instruction on "
            "the command line, {'prompt': 'instruction'} in Python."
        )
    return pairs


def _gpu_supports_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
