"""UPerHead's two 3 x 3 convolutions over concatenated maps: as mmseg has them, and as a sum of convolutions over
the maps, which are never concatenated; each with maps in channels-first and in channels-last order.

    python benchmarks/upernet_bottleneck.py [--channels 512] [--width 768] [--side 64] [--rounds 5]

Forward and backward passes of the whole head in fp32, with batch norms as in training, the ways in turn in one
run on the CPU, whose seconds of work are counted: other programs disturb them little. Peak memory is the growth
of resident memory in a first pass, which each way makes in a process of its own; kept is what the forward pass
leaves for the backward pass. Ends with a line of JSON: time_ratio and peak_ratio of each way over mmseg's own.
docs/performance.md says what came of it: nothing was kept, and this is the only place where the sum is.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import UPerHead
from mmseg.ops import resize
from speed_steps import Kept
from torch import Tensor, nn

WAYS = [(summed, last) for summed in (False, True) for last in (False, True)]
SCALES = (1, 2, 4, 8)


def name_of(way: tuple[bool, bool]) -> str:
    return f"{'sum' if way[0] else 'concatenated'}, {'channels last' if way[1] else 'channels first'}"


class SummedUPerHead(UPerHead):
    """mmseg's UPerHead whose bottlenecks add up convolutions over their maps."""

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """inputs: maps (b, c_i, h_i, w_i), the last of which is pooled -> (b, channels, h, w)."""
        return summed(self.bottleneck, [inputs[-1], *self.psp_modules(inputs[-1])])

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        maps = [lateral(inputs[index]) for index, lateral in enumerate(self.lateral_convs)]
        maps.append(self.psp_forward(inputs))
        for index in reversed(range(len(maps) - 1)):
            maps[index] = maps[index] + self._resized(maps[index + 1], maps[index])
        outputs = [*(conv(each) for conv, each in zip(self.fpn_convs, maps)), maps[-1]]
        del maps
        outputs[1:] = [self._resized(each, outputs[0]) for each in outputs[1:]]
        return summed(self.fpn_bottleneck, outputs)

    def _resized(self, values: Tensor, like: Tensor) -> Tensor:
        return resize(values, size=like.shape[2:], mode="bilinear", align_corners=self.align_corners)


def summed(bottleneck: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """What mmcv's ConvModule makes of the concatenated maps (b, c_i, h, w)."""
    conv: Any = bottleneck.conv
    parts = conv.weight.split([each.size(1) for each in maps], dim=1)
    total = F.conv2d(maps[0], parts[0], conv.bias, padding=conv.padding)
    for each, part in zip(maps[1:], parts[1:]):
        total = total.add_(F.conv2d(each, part, padding=conv.padding))
    norm: Any = bottleneck.norm
    activate: Any = bottleneck.activate
    result: Tensor = activate(norm(total))
    return result


class Pass:
    """A forward and backward pass of one way."""

    def __init__(self, way: tuple[bool, bool], args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        head = (SummedUPerHead if way[0] else UPerHead)(
            in_channels=[args.width] * 4,
            in_index=[0, 1, 2, 3],
            channels=args.channels,
            dropout_ratio=0.0,
            num_classes=150,
            norm_cfg=dict(type="BN"),
            align_corners=False,
        )
        order = torch.channels_last if way[1] else torch.contiguous_format
        self.head = head.train().to(memory_format=order)
        self.maps = [
            torch.randn(args.images, args.width, args.side // scale, args.side // scale)
            .to(memory_format=order)
            .requires_grad_()
            for scale in SCALES
        ]

    def __call__(self) -> Tensor:
        loss: Tensor = self.head(self.maps).square().mean()
        loss.backward()
        return loss

    def kept_bytes(self) -> int:
        with Kept() as kept:
            loss = self.head(self.maps).square().mean()
        found = kept.bytes()
        del loss
        return found


def peak_and_kept(way: tuple[bool, bool], args: argparse.Namespace) -> dict[str, int]:
    """Of a first pass, in a process of its own. Gradients of weights, which both ways have, lie there
    before."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(way, args, sender))
    process.start()
    sender.close()  # a process that fails ends the wait
    found: dict[str, int] = receiver.recv()
    process.join()
    return found


def _report_memory(way: tuple[bool, bool], args: argparse.Namespace, sender: Connection) -> None:
    torch.set_num_threads(args.threads)
    made = Pass(way, args)
    for param in (*made.head.parameters(), *made.maps):
        param.grad = torch.zeros_like(param)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # of VmHWM (Linux, proc(5))
    made()
    peak = _resident("VmHWM") - before
    sender.send({"peak_bytes": peak, "kept_bytes": made.kept_bytes()})


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def largest_difference(args: argparse.Namespace) -> float:
    """Of the two ways' gradients of the bottlenecks' weights, over their largest value."""
    found = []
    for way in ((False, False), (True, False)):
        made = Pass(way, args)
        made()
        found.append([made.head.fpn_bottleneck.conv.weight.grad, made.head.bottleneck.conv.weight.grad])
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for theirs, ours in zip(*found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=512, help="of the head (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="of the feature maps (default: %(default)s)")
    parser.add_argument("--side", type=int, default=64, help="of the largest map (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {name_of(way): {**peak_and_kept(way, args)} for way in WAYS}
    torch.set_num_threads(args.threads)  # after the forks, which its threads would not survive
    passes = {name_of(way): Pass(way, args) for way in WAYS}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for round_ in range(args.rounds + 1):
        for name in list(passes)[:: 1 if round_ % 2 else -1]:
            began = time.process_time()
            passes[name]()
            times[name].append(time.process_time() - began)
    own = name_of(WAYS[0])
    for name, row in rows.items():
        row["s"] = round(statistics.median(times[name][1:]), 4)
        row["time_ratio"] = round(row["s"] / statistics.median(times[own][1:]), 3)
        row["peak_ratio"] = round(row["peak_bytes"] / rows[own]["peak_bytes"], 3)
        print(
            f"{name:30} {row['s']:.3f} CPU s ({min(times[name][1:]):.3f} to {max(times[name][1:]):.3f})  "
            f"ratio {row['time_ratio']:.3f}  peak {row['peak_bytes'] / 2**20:.0f} MiB "
            f"({row['peak_ratio']:.3f})  kept {row['kept_bytes'] / 2**20:.0f} MiB"
        )
    settings = {key: getattr(args, key) for key in ("channels", "width", "side", "images", "threads")}
    print(json.dumps({**settings, "largest_difference": largest_difference(args), "ways": rows}))


if __name__ == "__main__":
    main()
