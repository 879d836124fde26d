"""The plan of a run, as values: how samples become batches (Feed), how a stage trains (Stage), what it stands on (Start)."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polysense.base.spec import Spec


@dataclass(frozen=True, kw_only=True)
class ImagePlan(Spec):
    """How a picture is read where nothing is random: exams, search, capabilities."""
    size: int
    fit: str = "crop"                                   # "crop": short side to size, centre crop; "squash": ignore the aspect ratio; "pad": to square
                                                        # around it; "corner": long side to size, filled below or at the right
    resample: str = "bicubic"                           # "bicubic" or "bilinear", antialiased
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)   # CLIP's; the ImageNet and 0.5 triples stand in recipes
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ViewPlan(Spec):
    """One random view of a picture. A chance of 0 switches a step off; the defaults change nothing but the crop."""
    size: int
    scale: tuple[float, float] = (0.9, 1.0)             # area of the random resized crop
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.0                                 # chance of colour jitter
    jitter_by: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)     # brightness contrast saturation hue
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SidesPlan(ViewPlan):
    """A square of `size` pixels cut anywhere from the picture, whose shorter side is first brought to a length drawn from `sides` (Krizhevsky et
    al. 2012: 256; Simonyan & Zisserman 2015: 256 to 512; He et al. 2016: 256 to 480). `scale` and `ratio` are not used."""
    sides: tuple[int, int]
    lighting: float = 0.0                               # deviation of the colour noise along the principal components of ImageNet's colours


@dataclass(frozen=True, kw_only=True)
class AugmentPlan(ViewPlan):
    """A view, then RandAugment (Cubuk et al. 2020) and random erasing (Zhong et al. 2020)."""
    operations: int = 2                                 # of fifteen, each applied with a chance of a half
    magnitude: float = 9.0                              # on a scale to 10
    vary: float = 0.5                                   # its deviation
    erase: float = 0.25                                 # chance that a rectangle becomes noise


@dataclass(frozen=True, kw_only=True)
class AugmentOnlyPlan(AugmentPlan):
    """The same with some of the operations alone (Li et al. 2021, ALBEF, section 3.5: none that changes a colour, as texts name colours)."""
    only: tuple[str, ...]                               # names of data/augment.py


@dataclass(frozen=True, kw_only=True)
class TextPlan(Spec):
    """Which tokeniser, and how long a text may be (start and end tokens included)."""
    kind: str = "bpe"                                   # "bpe": CLIP's lower-cased bytes; "wordpiece": BERT's; and published ones that are only
                                                        # read: "llama", "t5", "roberta", "marian"
    vocab: int                                          # upper bound; a tokeniser trained on few captions may stay below it
    length: int
    pad: str = "end"                                    # "end": pad with the end token (transformers); "zero": with 0 (OpenAI)


@dataclass(frozen=True, kw_only=True)
class WordsPlan(TextPlan):
    """Text with words that a system learned later: each becomes so many ids behind the vocabulary (`vocab`, `vocab` + 1, ...)."""
    new: tuple[tuple[str, int], ...]                    # (word, ids), such as (("<toy>", 1),)

    @property
    def plain(self) -> TextPlan:
        """The same without them: what the tokenizer was trained for."""
        return TextPlan(kind=self.kind, vocab=self.vocab, length=self.length, pad=self.pad)


@dataclass(frozen=True, kw_only=True)
class DropoutPlan(TextPlan):
    """Text whose words are spelled anew in training: each merge of the byte-pair encoding is left out with a chance (BPE-dropout)."""
    dropout: float
    plain = WordsPlan.plain


@dataclass(frozen=True, kw_only=True)
class NamedPlan(TextPlan):
    """Text of a system that learned what stands around the name of a class (CoOp): how a name is put, in training and wherever nothing else is
    asked for."""
    template: str = "{}."
    plain = WordsPlan.plain


@dataclass(frozen=True, kw_only=True)
class PairPlan(TextPlan):
    """Two sentences in one text in training, start A end B end: in half of them B is what follows A, in the others it is from elsewhere (BERT)."""


@dataclass(frozen=True, kw_only=True)
class PackPlan(TextPlan):
    """As many whole sentences in one text in training as fit, over the borders of documents, which get one end token more (RoBERTa)."""


@dataclass(frozen=True, kw_only=True)
class PromptPlan(TextPlan):
    """Text of a system that writes: how it is asked. Its tokeniser also learns the words of questions and answers."""
    pad: str = "zero"                                   # padding must not look like an end
    describe: str = ""                                  # what a caption continues, such as "a photo of"
    ask: str = "{}"                                     # how a question is put, such as "question: {} answer:"


@dataclass(frozen=True, kw_only=True)
class MirrorPlan(PromptPlan):
    """Text that follows its picture: where that is mirrored in training, these words change places (Desai & Johnson 2021, VirTex)."""
    swaps: tuple[tuple[str, str], ...] = (("left", "right"),)


@dataclass(frozen=True, kw_only=True)
class ChatPlan(PromptPlan):
    """Text of a system that converses: how turns become one sequence.

    start system, then for each turn: user what-is-said assistant reply end. The picture's place, one id, is in the first turn.
    """
    image: int                                          # id that holds the place of a picture; the tokenizer has none of that number
    describe: str = "describe the image briefly."
    briefly: tuple[str, ...] = ("describe the image briefly.",)     # instructions that a caption answers; training draws one
    system: str = ""
    user: str = "user:"
    assistant: str = "assistant:"
    stop: str = "reply"                                 # an end token stands behind each "reply", or behind "all" parts
    place: str = "before"                               # the picture stands "before" the first question, or in training on "either" side
    turns: int = 1                                      # questions about one picture that become one conversation in training
    short: str = ""                                     # said behind questions with short answers: the format of the response


@dataclass(frozen=True, kw_only=True)
class EpisodePlan(PromptPlan):
    """Text of a system that reads pictures and texts in turn: start, then picture text end, again and again (Flamingo)."""
    image: int                                          # id that holds the place of a picture; the tokenizer has none of that number
    shots: int = 3                                      # pictures, each with its caption, of one episode in training
    p_next: float = 0.0                                 # chance, in training, that the pictures of an episode stand behind their texts


@dataclass(frozen=True, kw_only=True)
class VideoPlan(Spec):
    """Which frames of a clip are read, and how each of them is."""
    frames: int = 8                                     # how many; 0 with "all": every one
    sample: str = "uniform"                             # "uniform": evenly over the clip, ends included; "all": from the start, at most `frames`;
                                                        # "stride": every `stride`-th of a window in the middle, in training anywhere
    stride: int = 1
    image: ImagePlan | None = None                      # None: the feed's


@dataclass(frozen=True, kw_only=True)
class ClipPlan(VideoPlan):
    """Clips for training without labels: several of every video that is decoded, each at a time, a crop and perhaps mirrored as drawn for it alone
    (Feichtenhofer et al. 2022, MAE-ST, section 3: repeated sampling)."""
    repeat: int = 1                                     # clips of a video, side by side in a batch; an epoch then shows every video so often
    view: ViewPlan | None = None                        # crop and mirror in training, one for all frames; no colours. None: as outside


@dataclass(frozen=True, kw_only=True)
class AudioPlan(Spec):
    """How a sound is read: mono, resampled to `rate`. Spectrograms belong to the towers: they are computed from these samples."""
    rate: int = 16000                                   # samples a second
    seconds: float | None = None                        # outside training: the middle of longer sounds, silence behind shorter ones; None: as it is
    train_seconds: float | None = None                  # in training, cut anywhere; None: as outside


@dataclass(frozen=True, kw_only=True)
class Feed(Spec):
    """How samples become batches. None or empty: that key is not made (`video` and `audio` have defaults)."""
    image: ImagePlan | None = None                      # how `image` is read outside training
    train_image: ViewPlan | None = None                 # the random view that becomes `image` in training (None: same as outside)
    views: tuple[ViewPlan, ...] = ()                    # becomes `views`, all of one size
    text: TextPlan | None = None
    video: VideoPlan | None = None                      # None: 8 frames, uniform, each read as `image` says
    audio: AudioPlan | None = None                      # None: at the source's rate, padded to the longest


@dataclass(frozen=True, kw_only=True)
class CropFeed(Feed):
    """Multi-crop: besides a few large `views`, small ones of another size (Caron et al. 2020, SwAV)."""
    crops: tuple[ViewPlan, ...] = ()                    # becomes `crops`, all of one size


@dataclass(frozen=True, kw_only=True)
class Optim(Spec):
    """The optimiser and its schedule. `lr` is for the stage's own batch size."""
    name: str = "adamw"                                 # adamw, adam, sgd, nesterov, lars, lamb, paged_adamw, adafactor
    lr: float
    weight_decay: float = 0.0                           # never on biases, norms, and parameters of fewer than two dimensions
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9                               # sgd, lars
    clip: float | None = None                           # largest gradient norm
    layer_decay: float = 1.0                            # lr_l = lr * layer_decay ** (L - l) along the tower's depth
    schedule: str = "cosine"                            # cosine, linear, constant, step, rsqrt, exponential
    warmup: int = 0                                     # steps of linear warm-up
    final: float = 0.0                                  # the last lr as a fraction of lr
    milestones: tuple[float, ...] = ()                  # "step": fractions of the stage at which lr is divided by ten
    lr_scale: tuple[tuple[str, float], ...] = ()        # (parameter pattern, factor) pairs


@dataclass(frozen=True, kw_only=True)
class RisingDecay(Optim):
    """Weight decay that goes from `weight_decay` to `final_decay` on a cosine over the stage (Caron et al. 2021, DINO)."""
    final_decay: float


@dataclass(frozen=True, kw_only=True)
class EarlyEnd(Optim):
    """The schedule ends after a share `over` of the stage, and its last learning rate stays (Ramesh et al. 2021, appendix A.2)."""
    over: float


@dataclass(frozen=True, kw_only=True)
class SteadyRates(Optim):
    """Some parameters keep their learning rate from the first step to the last (Chen & He 2021, SimSiam, section 4.2: the predictor's)."""
    steady: tuple[str, ...]                             # parameter patterns


@dataclass(frozen=True, kw_only=True)
class LookAhead(Optim):
    """The optimiser of that name runs ahead; every so many steps slow weights go a part of the way after it, and it begins from them again
    (Zhang et al. 2019, algorithm 1)."""
    every: int = 5
    follow: float = 0.5                                 # that part


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip(Optim):
    """Adaptive gradient clipping (Brock et al. 2021, equation 3): the gradient of a unit, a row of a weight or a whole vector, is at most
    `unit_clip` times as long as the unit itself. In place of the bound of `clip` on the whole gradient, which may be set besides."""
    unit_clip: float = 0.01
    unit_floor: float = 1e-3                            # units shorter than this count as this long, or zeros would stay zeros
    unclipped: tuple[str, ...] = ("head.*",)            # parameter patterns; the last dense layer goes free


@dataclass(frozen=True, kw_only=True)
class Stage(Spec):
    """One phase of training.

    `objective(system, batch) -> Losses`. Where `embed(system, batch) -> dict[str, Tensor]` is given, the objective receives
    what it returns in place of the batch: that split is what lets a contrastive batch be encoded in chunks (gradient caching).
    """
    name: str = "train"
    objective: Callable[..., Any]
    embed: Callable[..., Any] | None = None
    trainable: tuple[str, ...] = ("*",)                 # fnmatch patterns over parameter names
    weights: tuple[tuple[str, float], ...] = ()         # (loss term, factor) pairs
    steps: int
    batch_size: int                                     # global: over all ranks and accumulation
    optim: Optim
    chunk: int | None = None                            # with `embed`: encode this many samples at a time, exactly
    accumulate: int = 1                                 # without `embed`: split the batch and add gradients
    ema: float | None = None                            # decay of an averaged copy of the weights, saved beside them
    precision: str = "auto"                             # auto (bf16 where the hardware has it), bf16, fp32
    compile: bool = False
    checkpoint_activations: bool = False
    run: Callable[..., Any] | None = None               # another generator than train.fit (GANs, policy gradients)


@dataclass(frozen=True, kw_only=True)
class Start(Spec):
    """Weights that a preset stands on: `into` of this system takes `take` of a trained run of `from_`."""
    into: str
    from_: str
    take: str = ""
    preset: str = "tiny"


@dataclass(frozen=True, kw_only=True)
class Preset(Spec):
    """A system's configuration and the whole plan of its training."""
    config: Spec
    stages: tuple[Stage, ...]
    data: str                                           # sources joined by "+", as `--data` takes them
    feed: Feed = Feed()
    starts: tuple[Start, ...] = ()
