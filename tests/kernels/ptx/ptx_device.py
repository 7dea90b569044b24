"""A device made of the PTX executor: the real launchers compile for it, and their launches run on the CPU."""

import struct
from collections import Counter
from contextlib import contextmanager

import ptxsim
import torch
from compile_report import StandInDriver
from triton.runtime import driver


class PtxDevice:
    """What the launches inside ``on`` did: shared-memory hazards, and wavefronts against the ideal."""

    def __init__(self, target: str):
        self.target = target
        self.hazards = Counter()
        self.counts = Counter()
        self.flops = 0
        self.launched = []

    @contextmanager
    def on(self):
        before = driver._active
        stand_in = StandInDriver(self.target, self._launch)
        driver.set_active(stand_in)
        try:
            yield self
        finally:
            driver._active = before

    def _launch(self, source, metadata, args):
        grid, values = args[:3], args[9:]
        device = driver.active.get_current_device()
        compiled = source.fn.device_caches[device][0].values()
        ptx = next(kernel.asm["ptx"] for kernel in compiled if kernel.src is source)
        packed, tensors = [], []
        for (_, kind), value in zip(source.signature.items(), values, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                packed.append(value.data_ptr())
                tensors.append(value)
            elif kind.startswith("fp"):
                packed.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                packed.append(value & (2**64 - 1 if kind == "i64" else 2**32 - 1))
        packed += [0, 0]  # the scratch pointers that Triton appends
        sim = ptxsim.Sim(ptx, packed, grid, metadata.shared, tensors, check_race=True).run()
        self.hazards.update(sim.races)
        self.counts.update(sim.cnt)
        self.flops += sim.flops
        self.launched.append(source.fn.__name__)

    def conflicts(self) -> float:
        """Shared-memory wavefronts over the ideal number."""
        waves = sum(n for name, n in self.counts.items() if name.endswith(".wavefronts"))
        ideal = sum(n for name, n in self.counts.items() if name.endswith(".ideal"))
        return waves / max(ideal, 1)
