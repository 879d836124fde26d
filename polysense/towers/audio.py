"""The audio tower: a mel spectrogram read like a picture, its patches overlapping (Gong et al. 2021, AST; Girdhar et al. 2023, ImageBind)."""
from polysense.base.spec import Spec
from polysense.nn.mel import MelSpectrogram
from polysense.nn.tokens import PlaneTokens
from polysense.nn.transformer import Transformer
from polysense.towers.modal import ModalViT


def audio_vit(body: Transformer.Config, mel: MelSpectrogram.Config | None = None, kernel: int = 16, stride: int = 10, norm: Spec | None = None
              ) -> ModalViT.Config:
    """Sound [B,S] -> features: `kernel` square patches of the spectrogram, `stride` apart in time and pitch, a norm over the patch embeddings."""
    front = mel or MelSpectrogram.Config()
    return ModalViT.Config(front=front, body=body,
                           tokens=PlaneTokens.Config(size=(front.bins, front.frames), kernel=kernel, stride=stride, norm=norm))
