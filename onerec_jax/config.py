"""Model sizes: one frozen dataclass and the published presets.

Sizes come from the OneRec Technical Report (arXiv 2506.13695), Table 1 and section 2.2; what the
report leaves open (gate, dropout, capacity) is a field here with its default and the reason.
"""

import dataclasses
from typing import Literal

from onerec_jax.errors import InputError, require_at_least

PathwayName = Literal["static", "short", "positive", "lifelong"]
FeatureName = Literal["author", "tag", "age", "playtime", "duration", "label", "count"]
PATHWAYS: tuple[PathwayName, ...] = ("static", "short", "positive", "lifelong")
FEATURES: tuple[FeatureName, ...] = (
    "author",
    "tag",
    "age",
    "playtime",
    "duration",
    "label",
    "count",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Size and choices of one OneRec encoder-decoder."""

    d_model: int = 128
    """Width D of every block."""
    encoder_layers: int = 2
    decoder_layers: int = 2
    num_heads: int = 4
    ff_dim: int = 256
    """Hidden width of a dense feed-forward layer."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of the dense feed-forward layers (encoder, QFormer, decoder blocks without experts): the
    report names none. Experts are SwiGLU and the pathways' maps LeakyReLU whatever this says."""

    num_experts: int = 0
    """Routed experts E of each decoder feed-forward layer; 0 makes it dense."""
    experts_per_token: int = 2
    """Experts K that see each token (top-k)."""
    expert_dim: int = 256
    """Hidden width F of a SwiGLU expert."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: renormalised over the chosen experts (DeepSeek-V3); softmax: as OneRec V0."""
    capacity_factor: float = 0.0
    """Rows an expert may take, as a multiple of a balanced load; 0 = dropless, exact."""
    expert_every: int = 1
    """Every so many-th block has experts, the others a dense layer."""
    encoder_experts: bool = False
    """Experts in the encoder too, in the same places."""
    balance: Literal["bias", "auxiliary", "none"] = "bias"
    """What keeps the load of experts even: a bias that no gradient sees (arXiv 2408.15664, as in
    OneRec), an auxiliary loss (Switch Transformer, arXiv 2101.03961), or nothing."""
    auxiliary_weight: float = 1e-2
    """Of the auxiliary loss."""
    router_bias_rate: float = 1e-3
    """Step u of the loss-free balancing bias (arXiv 2408.15664)."""

    session_items: int = 1
    """Items m of a list that is generated as one sequence (OneRec V0, arXiv 2502.18965, section
    3.3): each item sees those before it. 1: point-wise, as OneRec V1."""
    session_place: bool = True
    """Of lists: add an embedding of an item's place in the list to its positions. The paper says
    nothing of positions; without it a place shows only in what lies before it."""

    pathways: tuple[PathwayName, ...] = PATHWAYS
    """Pathways that the encoder reads; one left out costs nothing and leaves the others as they
    are, initial parameters included."""
    features: tuple[FeatureName, ...] = FEATURES
    """Features of an interaction beside the item, of those that the data set has; `count` is the
    size of a lifelong cluster."""
    history_item: Literal["sid", "item"] = "sid"
    """What stands for an item in the history: its semantic ID or an embedding of its own."""
    short_length: int = 20
    positive_length: int = 256
    lifelong_length: int = 2000
    lifelong_queries: int = 128
    lifelong_blocks: int = 2
    pathway_dim: int = 256
    """Hidden width of the pathways' two-layer maps. The report does not print it; with that of the
    feed-forward layers, parameters add up to the names of its models."""
    author_dim: int = 512
    feature_dim: int = 128
    """Width of the tag, time, playtime, duration and label embeddings."""
    static_dim: int = 64
    """Width of each static user feature's embedding."""

    dropout: float = 0.0
    """Dropout after each sublayer and on pathway outputs; the papers name none."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more FLOPs."""
    unroll: bool = False
    """Compile every block by itself, not one for all in a loop: faster on GPUs, which then copy no
    activations in and out of the loop's stacks, and slower to compile."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """auto: cuDNN for 16-bit types on a GPU, XLA elsewhere."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU and TPU, float32 on CPU. Master weights are always float32."""

    def __post_init__(self):
        for name in ("pathways", "features"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not set(self.pathways) & {"short", "positive", "lifelong"}:
            raise InputError("--model.pathways names no history: add short, positive or lifelong")
        sizes = ("d_model", "encoder_layers", "decoder_layers", "num_heads", "ff_dim", "expert_dim")
        widths = ("author_dim", "feature_dim", "static_dim", "lifelong_queries", "lifelong_blocks")
        widths += ("expert_every", "pathway_dim", "session_items")
        lengths = ("short_length", "positive_length", "lifelong_length")
        zeros = (
            "num_experts",
            "capacity_factor",
            "router_bias_rate",
            "dropout",
            "auxiliary_weight",
        )
        require_at_least(self, "model.", **dict.fromkeys(sizes + widths, 1))
        require_at_least(self, "model.", **dict.fromkeys(zeros + lengths, 0))
        if self.d_model % self.num_heads:
            raise InputError(
                f"--model.d-model {self.d_model} is no multiple of --model.num-heads "
                f"{self.num_heads}: change one of them"
            )
        for stack in ("encoder", "decoder"):
            if (layers := getattr(self, f"{stack}_layers")) % self.expert_every:
                raise InputError(
                    f"--model.expert-every {self.expert_every} does not divide "
                    f"--model.{stack}-layers {layers}: change one of them"
                )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise InputError(
                f"--model.experts-per-token {self.experts_per_token} must lie between 1 and "
                f"--model.num-experts {self.num_experts}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def slots(self, pathway: PathwayName) -> int:
        """Interactions that a pathway holds; 0 if it is off."""
        return getattr(self, f"{pathway}_length") if pathway in self.pathways else 0

    def expert_layers(self, stack: Literal["encoder", "decoder"]) -> int:
        """Blocks of a stack that have experts."""
        if not self.num_experts or (stack == "encoder" and not self.encoder_experts):
            return 0
        layers = self.encoder_layers if stack == "encoder" else self.decoder_layers
        return layers // self.expert_every

    @property
    def encoder_length(self) -> int:
        """Most tokens of the encoder: static, short-term, positive feedback, lifelong queries."""
        lifelong = self.lifelong_queries if self.slots("lifelong") else 0
        return ("static" in self.pathways) + self.slots("short") + self.slots("positive") + lifelong


V1_LARGE = ModelConfig(
    d_model=1024,
    encoder_layers=4,
    decoder_layers=4,
    num_heads=8,
    ff_dim=2048,
    pathway_dim=2048,
    unroll=True,
)

PRESETS: dict[str, ModelConfig] = {
    # Small enough for two CPU cores; every part of the real model is there.
    "tiny": ModelConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        num_heads=4,
        ff_dim=128,
        num_experts=8,
        experts_per_token=2,
        expert_dim=64,
        short_length=20,
        positive_length=16,
        lifelong_length=32,
        lifelong_queries=4,
        lifelong_blocks=1,
        pathway_dim=64,
        author_dim=32,
        feature_dim=16,
        static_dim=16,
    ),
    "v1-0.015b": ModelConfig(),
    "v1-0.121b": V1_LARGE,
    # Experts of 2816, not the table's 2048: only so do the parameters add up to 0.935B.
    "v1-0.935b": dataclasses.replace(
        V1_LARGE, num_experts=24, experts_per_token=2, expert_dim=2816, capacity_factor=1.25
    ),
    # The report puts experts in "designated blocks" of both stacks: every other one comes nearest
    # to its parameters, with experts of 2688.
    "v1-2.633b": dataclasses.replace(
        V1_LARGE,
        encoder_layers=12,
        decoder_layers=12,
        num_experts=24,
        experts_per_token=4,
        expert_dim=2688,
        expert_every=2,
        encoder_experts=True,
        capacity_factor=1.25,
    ),
}
