"""The typed schema of every configuration value. YAML under `conf/` holds the values; see `docs/architecture.md`.

Plain dataclasses: the engine, the learners and the estimator take them as they are, and the command line
fills them from YAML. Nothing here imports torch, Lightning or Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LONGEST_DOCUMENT = 50_000_000  # characters: ten times a document of a million tokens
SIDE_BY_SIDE = 256  # texts that predictions read at once, if they are short
TOKENS_AT_A_TIME = 64 * 70  # that they read at once; see nn.reduced for predictions with fewer bits


@dataclass
class RulesConfig:
    """Reversible text rules applied before the tokenizer (see `text/rules.py`)."""

    unicode: str = "nfc"  # nfc | nfkc | none
    html: bool = True  # <br /> and &amp; become what a reader would see
    case: bool = True  # Word -> marker + word, WORD -> marker + word
    elongation: bool = True  # soooooo -> so + marker + count
    repetition: bool = True  # very very very -> marker + count + very


@dataclass
class TokenizerConfig:
    kind: str = "unigram"  # unigram | bpe
    vocab_size: int = 8000
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    sample_chars: int = 50_000_000  # characters of text the pieces are learnt from
    max_piece_length: int = 16
    sampling_alpha: float = 0.0  # > 0: subword regularisation while training a classifier
    rules: RulesConfig = field(default_factory=RulesConfig)


@dataclass
class DatasetConfig:
    """Where text and labels come from. Paths are relative to `path` (a folder) or `path` is the one file."""

    name: str = "helpdesk"
    path: str | None = None  # None: the sample data that ships
    format: str = "auto"  # auto csv tsv jsonl parquet folder fasttext text wikipedia wikitext huggingface packed
    text: list[str] = field(default_factory=lambda: ["text"])  # columns, joined by a newline
    label: str = "label"
    train: str | None = None  # file name or glob; None: train.* is looked for
    valid: str | None = None
    test: str | None = None
    unlabelled: str | None = None  # extra text for the language model
    encoding: str = "utf-8"
    delimiter: str | None = None  # csv only; None: by extension
    valid_fraction: float = 0.1  # used when there is no validation file
    test_fraction: float = 0.0  # used when there is no test file
    split_seed: int = 0
    train_size: int | None = None  # low-shot: this many training labels, class-balanced
    train_seed: int = 0  # which low-shot sample
    limit: int | None = None  # read at most this many rows of each split (for trials)
    max_document_chars: int = LONGEST_DOCUMENT  # a longer line or document is taken for damage or a bomb, and refused
    lm_use_test: bool = False  # also fine-tune the language model on test texts (never their labels)
    licence: str = ""  # of the text, if models trained on it have to name it: goes into their cards


@dataclass
class ModelConfig:
    """Shape of a network trained from scratch; a bundle brings its own."""

    embedding_dim: int = 400
    hidden_dim: int = 1152
    num_layers: int = 3


@dataclass
class DropoutConfig:
    """The five dropouts of the AWD-LSTM (Merity et al. 2017), each scaled by `multiplier`."""

    input: float = 0.25
    hidden: float = 0.15
    output: float = 0.1
    embedding: float = 0.02
    weight: float = 0.2
    multiplier: float = 1.0


@dataclass
class ScheduleConfig:
    name: str = "stlr"  # stlr | one_cycle | cosine | constant
    cut_frac: float = 0.1  # stlr: share of steps spent rising
    ratio: float = 32.0  # stlr: lowest rate is max / ratio
    warmup: float = 0.0  # cosine, constant: share of steps of linear warm-up
    floor: float = 0.0  # cosine: final share of the rate
    pct_start: float = 0.25  # one_cycle
    div: float = 25.0  # one_cycle: first rate is max / div
    final_div: float = 1e5  # one_cycle: last rate is max / final_div
    momentum: list[float] | None = None  # one_cycle: (high, low, high) of Adam's beta1; None leaves it alone
    restart_per_phase: bool = False  # one cycle for each unfreezing phase instead of one for the whole training


@dataclass
class DiscriminativeConfig:
    mode: str = "factor"  # factor | authors_lm | slice | none
    factor: float = 2.6  # rate of a group is the next higher group's / factor (paper, section 3.2)
    lowest: float | None = None  # slice: rate of the lowest group; groups between are geometric


@dataclass
class PhaseConfig:
    name: str = ""
    epochs: int = 1
    train_top: int | None = None  # this many groups from the top; None: all
    train_only: list[int] | None = None  # or exactly these groups (chain-thaw)
    lr_scale: float = 1.0


@dataclass
class UnfreezingConfig:
    mode: str = "full"  # gradual | authors | chain_thaw | last | full | phases
    phases: list[PhaseConfig] = field(default_factory=list)  # for mode=phases


@dataclass
class MethodConfig:
    """The method's three tricks; each becomes a Lightning Callback."""

    unfreezing: UnfreezingConfig = field(default_factory=UnfreezingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    discriminative: DiscriminativeConfig = field(default_factory=DiscriminativeConfig)


@dataclass
class OptimConfig:
    lr: float = 4e-3
    betas: list[float] = field(default_factory=lambda: [0.8, 0.99])
    eps: float = 1e-5
    weight_decay: float = 0.01
    clip: float | None = None  # gradient norm
    accumulate: int = 1


@dataclass
class FitConfig:
    """What both stages share."""

    epochs: int = 1
    max_steps: int | None = None  # stops earlier, and is then what the schedule is laid out for
    batch_size: int = 64
    optim: OptimConfig = field(default_factory=OptimConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    ar_alpha: float = 2.0
    tar_beta: float = 1.0
    patience: int | None = None  # early stopping: epochs (or validation runs) without improvement
    keep: str = "best"  # best | last: which weights the bundle holds
    valid_every: int | None = None  # validate each so many steps; None: each epoch
    half: bool = False  # store the bundle's weights in half precision: half the size, loaded as float32
    shard_mib: int | None = None  # store the bundle's encoder in files of at most so many MiB


@dataclass
class LMConfig(FitConfig):
    bptt: int = 70
    random_bptt: bool = True  # N(bptt, 5), 5 % of the time N(bptt/2, 5)
    direction: str | None = None  # None: the bundle's, or forward
    vocabulary: str = "keep"  # keep: the bundle's tokenizer | train: a new one on this text, embeddings transferred
    tokens_per_chunk: int | None = None  # rows of the softmax computed at a time; None: 1,024, on a GPU 8,192
    minutes: float | None = None  # train about so long: speed is measured, then max_steps set to the steps that fit


@dataclass
class ClassifierConfig(FitConfig):
    bptt: int = 70
    max_len: int = 1400  # tokens of a document, from its end, that pooling and gradients see
    tokens_per_batch: int = 20_000  # padded tokens a batch may hold; long documents make smaller batches
    head_hidden: int = 50
    head_dropout: list[float] = field(default_factory=lambda: [0.4, 0.1])
    class_weights: str = "none"  # none | balanced
    label_smoothing: float = 0.0


@dataclass
class StageConfig:
    name: str = "all"  # lm_pretrain | lm_finetune | classifier | all
    lm: LMConfig = field(default_factory=LMConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)


@dataclass
class TrainerConfig:
    """Passed on to `lightning.Trainer`, or resolved here first."""

    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"  # auto: bf16-mixed where the hardware multiplies it natively, else 32-true
    max_time: str | None = None  # DD:HH:MM:SS of one attempt; the same command then goes on
    deterministic: bool = False
    enable_progress_bar: bool = True
    matmul_precision: str | None = None  # of float32: highest | high (AMX, TF32: faster) | medium; None: torch's choice
    threads: int | None = None  # CPU threads; None leaves torch's choice
    cuda_graphs: bool = True  # on one NVIDIA GPU, a language model's steps are recorded once and replayed
    checkpoint_minutes: float = 5.0
    timeout_minutes: float = 30.0  # several processes: one that does not answer for so long is taken for lost


@dataclass
class LoggerConfig:
    csv: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "ulmfit"
    log_every: int = 10


@dataclass
class TrainConfig:
    """`python -m ulmfit train ...`."""

    stage: StageConfig = field(default_factory=StageConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    init: str | None = None  # bundle to start from; None: newest for this data set, else the shipped one; "scratch"
    publish: str | None = None  # name for the finished language model: it also goes into models/, for init=NAME
    seed: int = 0
    runs: str = "runs"  # folder that holds runs; where newest bundles are looked for
    cache: str = ""  # token caches; empty: the user's cache folder
    debug: bool = False


@dataclass
class EvaluateConfig:
    bundle: list[str] = field(default_factory=list)  # several: an ensemble; empty: the newest classifier
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    split: str = "test"  # train | valid | test
    output: str | None = None  # JSON file for the figures that are printed
    batch_size: int = SIDE_BY_SIDE
    precision: str = "32"  # 32 | auto (bf16 if native) | bf16 | int8 (CPU): of the network, as predict would use it
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    runs: str = "runs"
    cache: str = ""
    debug: bool = False


@dataclass
class PredictConfig:
    bundle: list[str] = field(default_factory=list)
    input: str | None = None  # file in any dataset format; None: standard input, one text a line
    output: str | None = None  # JSON lines; None: standard output
    text: list[str] = field(default_factory=lambda: ["text"])
    batch_size: int = SIDE_BY_SIDE
    precision: str = "32"  # 32 | auto (bf16 if native) | bf16 | int8 (CPU); fewer bits are faster, and less exact
    threads: int | None = None
    runs: str = "runs"
    debug: bool = False


@dataclass
class GenerateConfig:
    bundle: str | None = None
    prompt: str = ""
    tokens: int = 60
    samples: int = 1
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    beams: int = 0
    seed: int = 0
    runs: str = "runs"
    debug: bool = False


@dataclass
class FindLRConfig(TrainConfig):
    start: float = 1e-5
    end: float = 1.0
    steps: int = 100


@dataclass
class PackConfig(TrainConfig):
    output: str = "packed"  # a new or empty folder
    part_mb: int = 60  # no file is larger, in millions of bytes


@dataclass
class DownloadConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    runs: str = "runs"
    debug: bool = False


@dataclass
class InspectConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    bundle: str | None = None
    runs: str = "runs"
    debug: bool = False


@dataclass
class ReportConfig:
    runs: str = "runs"
    output: str | None = None  # .csv or .md; None: a table on standard output
    sort: str = ""  # a column of the table, such as test_error_%
    debug: bool = False
