"""The U-Net of jaxdiff.nets.unet once more in eager PyTorch, for the speed comparison only. Needs torch at run time.

`Twin` takes the parameters of a UNet by their Flax names, so that both networks compute the same function. It covers
what the comparison uses: resample="conv", time as the only conditioning.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from jaxdiff.nets.unet import UNet


class Twin(torch.nn.Module):
    """`twin(x, time)`: x (b, c, h, w) -> (b, c, h, w), with the settings of `net` and the weights `flat`."""

    def __init__(self, net: UNet, flat: dict[str, np.ndarray]):
        super().__init__()
        self.net = net
        self.names = set(flat)
        for name, value in flat.items():
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,))
            tensor = torch.from_numpy(np.array(value, np.float32).transpose(axes).copy())
            self.register_parameter(name.replace("/", "__"), torch.nn.Parameter(tensor))

    def _get(self, name: str) -> torch.Tensor:
        return getattr(self, name.replace("/", "__"))

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        if stride == 2:  # SAME padding of an even size at stride 2 is all on the far side
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self._get(f"{name}/kernel"), self._get(f"{name}/bias"), 2)
        return F.conv2d(x, self._get(f"{name}/kernel"), self._get(f"{name}/bias"), padding=1)

    def _dense(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._get(f"{name}/kernel"), self._get(f"{name}/bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.group_norm(x, self.net.groups, self._get(f"{name}/scale"), self._get(f"{name}/bias"), self.net.eps)

    def _block(self, x: torch.Tensor, e: torch.Tensor, name: str) -> torch.Tensor:
        h = self._conv(F.silu(self._norm(x, f"{name}/norm_in")), f"{name}/conv_in")
        e = self._dense(e, f"{name}/embedding")[:, :, None, None]
        if self.net.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = F.silu(self._norm(h, f"{name}/norm_out") * (1 + scale) + shift)
        else:
            h = F.silu(self._norm(h + e, f"{name}/norm_out"))
        h = self._conv(h, f"{name}/conv_out")
        if f"{name}/skip/kernel" in self.names:
            x = F.conv2d(x, self._get(f"{name}/skip/kernel")[:, :, None, None], self._get(f"{name}/skip/bias"))
        x = x + h
        return self._attend(x, name) if f"{name}/attention_norm/scale" in self.names else x

    def _attend(self, x: torch.Tensor, name: str) -> torch.Tensor:
        b, c = x.shape[:2]
        heads = self.net.heads if self.net.head_channels is None else c // self.net.head_channels
        h = self._norm(x, f"{name}/attention_norm").flatten(2).transpose(1, 2)
        qkv = self._dense(h, f"{name}/attention/qkv").reshape(b, -1, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(b, -1, c)
        return x + self._dense(h, f"{name}/attention/out").transpose(1, 2).reshape(x.shape)

    def _embed(self, time: torch.Tensor) -> torch.Tensor:
        half = self.net.channels // 2
        exponent = torch.arange(half) / (half - 1 if self.net.time_endpoint else half)
        angle = time[:, None] * self.net.time_scale * torch.exp(-math.log(10_000) * exponent)
        h = self._dense(torch.cat([angle.sin(), angle.cos()], 1), "time/hidden")
        return F.silu(self._dense(F.silu(h), "time/out"))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        p = self.net.patch_size
        b, c, height, width = x.shape
        x = x.reshape(b, c, height // p, p, width // p, p).permute(0, 3, 5, 1, 2, 4)
        e, h = self._embed(time), x.reshape(b, p * p * c, height // p, width // p)
        if self._get("stem/kernel").is_contiguous(memory_format=torch.channels_last):
            h = h.contiguous(memory_format=torch.channels_last)
        h = self._body(self._conv(h, "stem"), e)
        h = self._conv(F.silu(self._norm(h, "out_norm")), "out")
        return h.reshape(b, p, p, c, *h.shape[2:]).permute(0, 3, 4, 1, 5, 2).reshape(b, c, height, width)

    def _body(self, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        net, skips = self.net, [h]
        top = len(net.multipliers) - 1
        for level in range(top + 1):
            if level > 0:
                h = self._conv(h, f"down_{level}", stride=2)
                skips.append(h)
            for i in range(net.num_blocks):
                h = self._block(h, e, f"down_{level}_{i}")
                skips.append(h)
        h = self._block(self._block(h, e, "mid_0"), e, "mid_1")
        for level in range(top, -1, -1):
            if level < top:
                h = self._conv(F.interpolate(h, scale_factor=2, mode="nearest"), f"up_{level}")
            for i in range(net.num_blocks + 1):
                h = self._block(torch.cat([h, skips.pop()], 1), e, f"up_{level}_{i}")
        return h


def trainer(net: UNet, flat: dict[str, np.ndarray], *, channels_last: bool, threads: int) -> tuple[Any, Any]:
    """(predict, step): `predict(x, time)` and `step(x, time, noise) -> loss` on NHWC numpy arrays; Adam."""
    torch.set_num_threads(threads)
    twin = Twin(net, flat)
    twin = twin.to(memory_format=torch.channels_last) if channels_last else twin
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)

    def tensor(x: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(x).permute(0, 3, 1, 2)
        return x if channels_last else x.contiguous()

    def predict(x: np.ndarray, time: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return twin(tensor(x), torch.from_numpy(time)).permute(0, 2, 3, 1).numpy()

    def step(x: np.ndarray, time: np.ndarray, noise: np.ndarray) -> float:
        optimizer.zero_grad()
        loss = F.mse_loss(twin(tensor(x), torch.from_numpy(time)), tensor(noise))
        loss.backward()
        optimizer.step()
        return loss.item()

    return predict, step
