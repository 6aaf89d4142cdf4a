"""The options of a training run: transformers' `TrainingArguments` plus what preference optimization needs.

Names and defaults are those of TRL 1.16's `DPOConfig`, so that a configuration written for it works unchanged. Defaults
that differ from `TrainingArguments` are `learning_rate`, `logging_steps`, `gradient_checkpointing`, `bf16` (see its
help) and `logging_nan_inf_filter`.
"""

import importlib.util
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments

from dpo_fast.batches.groups import ComparisonChoice
from dpo_fast.losses import LOSSES, SMOOTHED, FDivergence, LossParameters, named_loss, uses

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
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(
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
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. Unset, the model's configuration "
            "decides; 0 turns it off."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set every dropout probability of policy and reference to 0."},
    )

    # Data.
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that tokenise the dataset."},
    )
    max_length: int | None = field(
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
    precompute_ref_batch_size: int | None = field(
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
        default=None,
        metadata={"help": "One weight for each loss type. Unset, all weigh 1."},
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
        default=0.5,
        metadata={"help": "α of the α-divergence; 1 is the reverse KL."},
    )
    use_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weigh every comparison by how likely the policy is to write its two completions (WPO); with any "
            "loss."
        },
    )
    ld_alpha: float | None = field(
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
    rpo_alpha: float | None = field(
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
    discopop_tau: float = field(
        default=0.05,
        metadata={"help": "Temperature τ of the loss discopop, above 0."},
    )

    # Speed and memory.
    layout: LayoutChoice = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: 'shared' packs without padding and runs each prompt once, 'padded' is "
            "the usual rows and works for every architecture, 'auto' takes 'shared' where the model allows it."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
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

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str) or callable(self.loss_type):
            self.loss_type = [self.loss_type]
        self._check_choices()
        self._check_metrics()
        self._check_loss()
        self._check_lengths()
        self.columns = _column_names(self.columns)
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
        self._settle_layer_kernels()
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # else a copy holds the host up anyway
        self._check_parallelism()
        coupled = any(uses(name, "step") for name in self.loss_mix)  # several packs cost another forward pass then
        if self.max_tokens_per_micro_batch is None and self.device.type == "cpu" and not coupled:
            self.max_tokens_per_micro_batch = _CPU_TOKENS
        if isinstance(self.model_init_kwargs, str):
            raise ValueError(
                f"model_init_kwargs={self.model_init_kwargs!r} is not a mapping; on the command line give a JSON "
                """object, for example --model_init_kwargs '{"revision": "main"}'."""
            )

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

    def _check_parallelism(self) -> None:
        """Refuses what gives several ranks the same rows, or parts of each: the trainer gives each row to one rank."""
        for name, size in self._parallel_sizes().items():
            if size > 1 and name.endswith(("tp_size", "autotp_size")):
                raise ValueError(tensor_parallel_refusal(f"{name}={size}"))
            if size > 1:
                raise ValueError(
                    f"{name}={size} would cut sequences across GPUs, and completions share the keys of a prompt across "
                    "the cut; leave it at 1. For long sequences bound max_tokens_per_micro_batch, turn "
                    "gradient_checkpointing on and shard the model with FSDP2 or ZeRO-3, offloaded if need be."
                )
        for name in ("dispatch_batches", "split_batches"):
            if self.world_size > 1 and getattr(self.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config.{name}=True would cut batches by rows, and ranks get groups by their "
                    "cost; leave it out. per_device_train_batch_size times the number of ranks is the whole batch."
                )

    def _parallel_sizes(self) -> dict[str, int]:
        """Ranks that a model or a sequence is shared out among, by the setting that says so."""
        names = ("cp_size", "sp_size", "tp_size")
        given, sizes = getattr(self, "parallelism_config", None), {}
        if given is not None:
            sizes = {f"parallelism_config.{name}": getattr(given, name, 1) for name in names}
        elif os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":  # of `accelerate launch`
            values = {name: os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1") for name in names}
            sizes = {f"parallelism_config.{name}": int(value) for name, value in values.items()}
        if (plugin := getattr(self, "deepspeed_plugin", None)) is not None:
            options = plugin.deepspeed_config
            sizes["deepspeed.sequence_parallel_size"] = options.get("sequence_parallel_size", 1)
            sizes["deepspeed.tensor_parallel.autotp_size"] = options.get("tensor_parallel", {}).get("autotp_size", 1)
        return sizes

    def _check_choices(self) -> None:
        choices = {
            "truncation_mode": TruncationMode,
            "comparisons": ComparisonChoice,
            "layout": LayoutChoice,
            "couple": CoupleChoice,
            "layer_kernels": LayerKernelsChoice,
        }
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose from {list(get_args(choice))}.")
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} saves padding, which packs have none of; "
                "groups are assigned to ranks by their cost already; take 'random' or 'sequential'."
            )

    def _settle_layer_kernels(self) -> None:
        """Let `layer_kernels` and transformers' own options say the same; refuse those of Liger that cannot be had."""
        compiles = self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        for kernels, option, asked in (
            ("liger", "use_liger_kernel", self.use_liger_kernel),
            ("compile", "torch_compile", compiles),
        ):
            if asked and self.layer_kernels not in ("auto", kernels):
                raise ValueError(
                    f"{option}=True asks for layer_kernels={kernels!r}, which is {self.layer_kernels!r}; keep one of "
                    "the two."
                )
            self.layer_kernels = kernels if asked else self.layer_kernels
        self.torch_compile = self.layer_kernels == "compile"
        self.use_liger_kernel = False  # with which transformers would apply Liger's kernels again, and its head
        if self.layer_kernels != "liger":
            return
        if importlib.util.find_spec("liger_kernel") is None:
            raise ValueError(
                "layer_kernels='liger' needs liger-kernel, which is not installed: pip install liger-kernel, or take "
                "'none' or 'compile'."
            )
        heads = {name for name, on in (self.liger_kernel_config or {}).items() if on and name.endswith("cross_entropy")}
        if heads:
            raise ValueError(
                f"liger_kernel_config turns {sorted(heads)} on, which would put Liger's forward in the packed one's "
                "place; leave it out: head and loss are fused."
            )

    def _check_metrics(self) -> None:
        """Refuses options of transformers' evaluation that mean nothing to packs of completions."""
        if set(self.include_for_metrics) - {"loss"}:
            raise ValueError(
                f"include_for_metrics={self.include_for_metrics!r}: beside rewards and weights compute_metrics can "
                "have 'loss' alone, as inputs are packs; leave the others out."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor!r} smooths targets of tokens, which no loss here "
                "looks at; leave it at 0. label_smoothing is the probability that a preference is flipped."
            )
        if self.label_names not in (None, [], ["labels"]):
            raise ValueError(
                f"label_names={self.label_names!r} means nothing to preferences: compute_metrics gets the comparisons' "
                "weights as labels; leave it out."
            )

    def _check_loss(self) -> None:
        if not self.loss_type:
            raise ValueError(f"loss_type={self.loss_type!r} must name at least one loss of {sorted(LOSSES)}.")
        self.loss_type = [named_loss(loss) for loss in self.loss_type]
        if self.loss_weights is not None:
            if not isinstance(self.loss_weights, list | tuple) or len(self.loss_weights) != len(self.loss_type):
                raise ValueError(
                    f"loss_weights={self.loss_weights!r} must list one weight for each of the {len(self.loss_type)} "
                    f"loss types {self.loss_type}; leave it out to weigh all of them 1."
                )
            if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in self.loss_weights):
                raise ValueError(f"loss_weights={self.loss_weights!r} must be finite numbers; correct the odd one out.")
        self.loss_parameters.check(self.loss_type)
        if self.rpo_alpha is not None and (
            not isinstance(self.rpo_alpha, int | float) or not 0 <= self.rpo_alpha < math.inf
        ):
            raise ValueError(f"rpo_alpha={self.rpo_alpha!r} must be a finite number, 0 or more.")
        if self.ld_alpha is not None and (not isinstance(self.ld_alpha, int | float) or not 0 <= self.ld_alpha <= 1):
            raise ValueError(
                f"ld_alpha={self.ld_alpha!r} must lie in [0, 1], or be None; the paper takes 0.3 to 0.6 "
                "for instruct models."
            )
        if self.use_weighting and (coupled := [name for name in self.loss_type if uses(name, "step")]):
            raise ValueError(
                f"use_weighting=True does not go with {coupled}, which look at a whole step before its pairs can be "
                f"weighed; turn it off, or leave them out of loss_type={self.loss_type}."
            )

    def _check_lengths(self) -> None:
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < 2):
            raise ValueError(
                f"max_length={self.max_length!r} must be an integer of at least 2 (one token of prompt, one of "
                "completion), or None to cut nothing."
            )
        for name in ("max_tokens_per_micro_batch", "precompute_ref_batch_size", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1, or None for the default.")


def tensor_parallel_refusal(setting: str) -> str:
    """Why `setting`, which shares out a model's matrices among ranks, is not for the trainer, and what is."""
    return (
        f"{setting}: the ranks of a tensor-parallel model need the same rows, and DPOTrainer gives each its own; leave "
        "it out and shard the model with FSDP2 or ZeRO-3 (examples/accelerate). In a loop of your own, add_dpo_forward "
        "takes a tensor-parallel model."
    )


def _pad_multiple(value: int | str | None) -> int | None:
    """The command line passes numbers as text."""
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"pad_to_multiple_of={value!r} must be an integer of at least 1, 'auto' or None; try 8.")
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
        raise ValueError(
            f"columns={value!r} must map our names of columns to those of the dataset: --columns prompt=instruction on "
            "the command line, {'prompt': 'instruction'} in Python."
        )
    return pairs


def _gpu_supports_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
