"""SimCLR's backbone in torchvision's ResNet names, as converters of the authors' TensorFlow checkpoints write it (`resnet50-1x.pth`): a state under
"state_dict", no head of SimCLR's, and often the linear classifier `fc` that was fitted on the frozen features, which is left behind."""
from typing import Any

from polysense.base.errors import UserError
from polysense.weights import resnet_timm
from polysense.weights.keymap import KeyMap, State
from polysense.weights.layout import Layout
from polysense.weights.sizes import Dict


def keymap(config: Any) -> KeyMap:
    return resnet_timm.VISION.at("", "backbone") + KeyMap((), drop=(r"fc\..*",), own=(r"projector\..*",))


def read(config: Dict, state: State) -> tuple[str, Dict]:
    """(preset, overrides) from the shapes."""
    name, found = resnet_timm.read({}, state)
    if name != "resnet50":
        raise UserError("this ResNet is made of basic blocks", "SimCLR publishes bottlenecks: ResNet-50 and wider ones")
    return "features", {k: v for k, v in found.items() if k.startswith("config.backbone.")}


def write(config: Any) -> Dict:
    """Nothing but the check that torchvision's names could hold this backbone."""
    c = config.backbone
    if not hasattr(c, "layers") or getattr(c.block, "stride_in", "") != "3x3" or len(c.layers) != 4:
        raise UserError("torchvision's names hold a ResNet of four stages of bottlenecks", "keep the run folder")
    return {}


LAYOUT = Layout(of="simclr", name="torchvision", keymap=keymap, read=read, write=write, config_file="", weights_file="simclr.pth")
