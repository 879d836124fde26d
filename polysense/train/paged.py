"""AdamW whose moments lie in a file that is mapped into memory: the system may put pages of it onto the disk when memory runs short."""
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class PagedAdamW(AdamW):
    """The update of AdamW, number for number (Dettmers et al. 2023, section 3, for memory that spikes). On processors the moments are views of one
    file in the folder for temporary files, gone with the process; on accelerators torch has no paged memory, and they are allocated as usual."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        held = [p for g in self.param_groups for p in g["params"] if p.device.type == "cpu"]
        total = 2 * sum(p.numel() for p in held)
        if not total:
            return
        with tempfile.TemporaryDirectory() as folder:        # the mapping outlives the name
            page = torch.from_file(str(Path(folder) / "moments"), shared=True, size=total, dtype=torch.float32)
        at = 0
        for p in held:
            one, two = page[at:at + p.numel()].view_as(p), page[at + p.numel():at + 2 * p.numel()].view_as(p)
            self.state[p] = {"step": torch.tensor(0.0), "exp_avg": one, "exp_avg_sq": two}
            at += 2 * p.numel()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the mapped memory, not beside it."""
        mapped = {p: (s["exp_avg"], s["exp_avg_sq"]) for p, s in self.state.items()}
        super().load_state_dict(state_dict)
        for p, moments in mapped.items():
            for name, place in zip(("exp_avg", "exp_avg_sq"), moments):
                if isinstance(value := self.state.get(p, {}).get(name), Tensor):
                    place.copy_(value)
                    self.state[p][name] = place
