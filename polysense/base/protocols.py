"""What a task, a pipeline or an agent may ask of a system. Structural: a system never inherits from these. Torch-free."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, device

    from polysense.base.plan import Preset


@runtime_checkable
class EncodesImage(Protocol):
    def encode_image(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], normalised as the feed says -> [B,D], unit norm."""
        ...


@runtime_checkable
class EncodesText(Protocol):
    def encode_text(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,D], unit norm, in the space of encode_image where the system has both."""
        ...


@runtime_checkable
class EncodesPatches(Protocol):
    def encode_patches(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,h,w,D], unit norm, comparable with encode_text: what heat-maps are drawn from."""
        ...


@runtime_checkable
class EncodesWords(Protocol):
    def encode_words(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,L,D], unit norm, comparable with encode_patches; zeros at padding: what `search --by late` asks."""
        ...


@runtime_checkable
class EncodesImageTerms(Protocol):
    def encode_image_terms(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,V], the weight (>= 0, mostly 0) of each token of the text vocabulary: what an inverted index holds."""
        ...


@runtime_checkable
class EncodesTextTerms(Protocol):
    def encode_text_terms(self, text: Tensor) -> Tensor:
        """text [B,L] token ids -> [B,V], weights as encode_image_terms gives them; their dot product is the score of `search --by sparse`."""
        ...


@runtime_checkable
class EncodesVideo(Protocol):
    def encode_video(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] -> [B,D], unit norm."""
        ...


@runtime_checkable
class EncodesVideoParts(Protocol):
    def encode_video_parts(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] -> [B,K,D], unit norm: several vectors a video; a text's similarity is the largest of their cosines."""
        ...


@runtime_checkable
class StreamsVideo(Protocol):
    def encode_stream(self, chunks: Iterable[Tensor]) -> Tensor:
        """The frames of one video in pieces [t,3,H,W] -> [K,D], unit norm, as `encode_video_parts` of all of them would give."""
        ...


@runtime_checkable
class EncodesAudio(Protocol):
    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio [B,S] -> [B,D], unit norm."""
        ...


@runtime_checkable
class EncodesDepth(Protocol):
    def encode_depth(self, depth: Tensor) -> Tensor:
        """depth [B,1,H,W] -> [B,D], unit norm."""
        ...


@runtime_checkable
class EncodesThermal(Protocol):
    def encode_thermal(self, thermal: Tensor) -> Tensor:
        """thermal [B,1,H,W] -> [B,D], unit norm."""
        ...


@runtime_checkable
class EncodesIMU(Protocol):
    def encode_imu(self, imu: Tensor) -> Tensor:
        """imu [B,C,S], C channels of S samples -> [B,D], unit norm."""
        ...


@runtime_checkable
class Classifies(Protocol):
    def classify(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> logits [B,C] over the classes it was trained on."""
        ...


@runtime_checkable
class ClassifiesVideo(Protocol):
    def classify_video(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] -> logits [B,C] over the classes it was trained on; UserError for a system that was trained on none."""
        ...


@runtime_checkable
class MatchesText(Protocol):
    def match_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W] and text [B,L] token ids, or one of either for all of the other -> probability [B] that they belong together."""
        ...


@runtime_checkable
class GroundsText(Protocol):
    def ground_text(self, image: Tensor, text: Tensor) -> Tensor:
        """image [B,3,H,W], text [B,L] -> [B,h,w] in [0,1]: where in the picture the text is found, 1 at the strongest place."""
        ...


@runtime_checkable
class GuessesWords(Protocol):
    def guess_words(self, text: Tensor, hidden: Tensor) -> Tensor:
        """text [B,L] token ids, hidden bool [B,L] True at the words to be guessed (whose ids are not read) -> probabilities [N,V] of the N of them,
        row by row."""
        ...


@runtime_checkable
class TranslatesText(Protocol):
    def translate_text(self, text: Tensor, *, max_new: int) -> Tensor:
        """text [B,L] token ids, padded on the right -> ids [B,N] of another text, N <= max_new, up to and with the end token."""
        ...


@runtime_checkable
class GeneratesText(Protocol):
    def generate_text(self, image: Tensor, prompt: Tensor, *, max_new: int) -> Tensor:
        """image [B,3,H,W], prompt [B,L] ids as the feed writes them, right-padded -> new ids [B,N], N <= max_new, up to and with the end token."""
        ...


@runtime_checkable
class GeneratesImage(Protocol):
    def generate_image(self, text: Tensor, *, steps: int, **control: Tensor) -> Tensor:
        """text [B,L] token ids -> one picture each, [B,3,H,W], normalised as the feed says; drawn from torch's global random numbers.

        steps: of the sampler, where the system has one. control: what else may steer it, by batch key (`hint` [B,C,H,W]) and as `guidance` [];
        UserError for one that the system does not know.
        """
        ...


@runtime_checkable
class SamplesImage(Protocol):
    def sample_image(self, count: int, *, steps: int) -> Tensor:
        """Pictures out of nothing, [count,3,H,W], normalised as the feed says; drawn from torch's global random numbers. steps: as above."""
        ...


@runtime_checkable
class Attends(Protocol):
    def attend(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> [B,heads,h,w]: how much the class token of the last block looks at each patch; with itself it sums to one."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    def reconstruct(self, image: Tensor) -> Tensor:
        """image [B,3,H,W], normalised as the feed says -> the same picture as the system sees it, [B,3,H,W], normalised alike."""
        ...


@runtime_checkable
class EncodesCodes(Protocol):
    def encode_codes(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] -> numbers of the codes that stand for it, int [B,h,w]."""
        ...


@runtime_checkable
class DecodesCodes(Protocol):
    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes int [B,h,w] -> image [B,3,H,W], normalised as the feed says."""
        ...


@runtime_checkable
class MarksKeypoints(Protocol):
    def keypoints(self, image: Tensor, boxes: Tensor) -> Tensor:
        """image [B,3,H,W], boxes [B,N,4] (x0 y0 x1 y1 in [0,1]) -> [B,N,K,3], the parts of the thing in each box: x y in [0,1] and 1, or zeros where
        it is hidden."""
        ...


@runtime_checkable
class RendersView(Protocol):
    def render_view(self, origin: Tensor, direction: Tensor) -> Tensor: ...


@runtime_checkable
class AnswersAboutVideo(Protocol):
    def answer_about_video(self, video: Tensor, question: str) -> str: ...


@runtime_checkable
class Segments(Protocol):
    def segment(self, image: Tensor, points: Tensor | None = None, point_label: Tensor | None = None, boxes: Tensor | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """image [B,3,H,W]; for N objects a picture: points [B,N,K,2] (x y in [0,1]) with point_label [B,N,K] (1 inside, 0 outside, -1 padding),
        boxes [B,N,4] (x0 y0 x1 y1 in [0,1]), mask [B,N,h,w] (logits of an earlier answer) -> logits [B,N,M,h,w] of M candidate masks of each
        object, positive inside, over the whole input picture at the system's own resolution, and their predicted IoU [B,N,M]."""
        ...


@runtime_checkable
class Detects(Protocol):
    def detect(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image [B,3,H,W] -> boxes [B,N,4] (x0 y0 x1 y1 in [0,1]), class [B,N] (-1: no object) and score [B,N] in [0,1], best first."""
        ...


@runtime_checkable
class Asks(Protocol):
    def ask(self, question: str, images: Sequence[str] = ()) -> str:
        """A question and the paths of pictures -> an answer, by way of other systems: what agents do."""
        ...


class Subject(Protocol):
    """What an exam examines and the app stands on: a system with everything needed to feed it. `Pipeline` is one."""
    system: Any
    preset: Preset
    tokenizer: Any
    device: device

    def read_images(self, images: list[Any]) -> Tensor:
        """Paths, PIL pictures or uint8 arrays -> [B,3,H,W] on the device."""
        ...

    def read_texts(self, texts: list[str]) -> Tensor:
        """Strings -> token ids [B,L] on the device."""
        ...


CAPABILITIES: dict[str, type] = {
    "encode_image": EncodesImage, "encode_text": EncodesText, "encode_patches": EncodesPatches, "encode_video": EncodesVideo,
    "encode_words": EncodesWords, "encode_image_terms": EncodesImageTerms, "encode_text_terms": EncodesTextTerms,
    "encode_video_parts": EncodesVideoParts, "encode_stream": StreamsVideo,
    "encode_audio": EncodesAudio, "encode_depth": EncodesDepth, "encode_thermal": EncodesThermal, "encode_imu": EncodesIMU,
    "match_text": MatchesText, "ground_text": GroundsText, "classify": Classifies, "classify_video": ClassifiesVideo, "generate_text": GeneratesText,
    "generate_image": GeneratesImage, "guess_words": GuessesWords, "translate_text": TranslatesText,
    "sample_image": SamplesImage,
    "attend": Attends, "reconstruct": Reconstructs, "encode_codes": EncodesCodes, "decode_codes": DecodesCodes,
    "segment": Segments, "detect": Detects, "keypoints": MarksKeypoints, "render_view": RendersView, "answer_about_video": AnswersAboutVideo,
    "ask": Asks,
}


def fulfils(thing: object, capability: str) -> bool:
    return isinstance(thing, CAPABILITIES[capability])


def capabilities(cls: type) -> tuple[str, ...]:
    """The capabilities that a class implements, in the order of the table above."""
    return tuple(k for k, p in CAPABILITIES.items() if issubclass(cls, p))
