"""An exported UNet in the place of the original one: pipelines of diffusers run with it as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.session import Session
from deltahub.errors import ConverterError

__all__ = ["OnnxUNet"]


class OnnxUNet(nn.Module):
    """What a pipeline of diffusers asks of its ``unet``, answered by ONNX Runtime.

    ``pipeline.unet = OnnxUNet(Session("out/"), pipeline.unet.config)``

    Args:
        session: an export for the task ``unet``; its active deltas act.
        config: the UNet's configuration, which pipelines read.

    Raises:
        ConverterError: ``E_ONNX_TASK`` for an export of something else.
    """

    def __init__(self, session: Session, config: Any) -> None:
        super().__init__()
        if "sample" not in session.inputs or "out_sample" not in session.outputs:
            raise ConverterError("E_ONNX_TASK", "this is no export of a UNet", where=session.folder,
                                 expected="unet", found=session.report.get("task"))  # fmt: skip
        self.session = session
        self.config = config
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.add_embedding = SimpleNamespace()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **further: Any,
    ) -> Any:
        """Predict the noise.

        Args:
            sample: latents, float32 ``[batch, channels, height, width]``.
            timestep: one number, or one per row.
            encoder_hidden_states: the prompts, float32 ``[batch, length, width]``.
            return_dict: give an object with ``sample``, else a tuple.
            further: what other UNets take; anything but ``None`` is refused.

        Raises:
            ConverterError: ``E_ONNX_INPUT`` for what the graph has no input for.
        """
        unheeded = [name for name, value in further.items() if value is not None]
        if unheeded:
            raise ConverterError("E_ONNX_INPUT", "the graph has no such input", found=", ".join(unheeded))
        steps = torch.as_tensor(timestep).to(torch.int64).reshape(-1).expand(sample.shape[0])
        out = self.session.run(
            {
                "sample": sample.numpy(),
                "timestep": steps.numpy(),
                "encoder_hidden_states": encoder_hidden_states.numpy(),
            }
        )
        found = torch.from_numpy(out["out_sample"])
        return SimpleNamespace(sample=found) if return_dict else (found,)
