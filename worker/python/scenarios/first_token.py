"""Time to first token of a model of Llama-3-8B's shape with random weights, in PyTorch: the prompt's prefix computed,
against its blocks from device memory, host memory and the drive, leased through this package.

Prints a line of JSON for each figure. Needs torch, and a ``terraced`` whose configuration has ``[[hbm]]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import terrace_kv
import torch
from torch.nn import functional

BLOCK_TOKENS = 16
PATIENCE = 120.0
# Median of three: the first call of each way warms the kernels up, and does not count.
ROUNDS = 3


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    def block(self) -> tuple[int, ...]:
        return self.layers, 2, BLOCK_TOKENS, self.kv_heads, self.head_dim

    def block_bytes(self) -> int:
        return 2 * self.layers * 2 * BLOCK_TOKENS * self.kv_heads * self.head_dim


SHAPES = {
    "llama-3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "tiny": Shape(2, 64, 4, 2, 16, 128, 512),
}


class Model:
    """A decoder with grouped attention. The weights are random, the work is that of a real one."""

    def __init__(self, shape: Shape, place: torch.device) -> None:
        torch.manual_seed(7)
        self.shape, self.place = shape, place

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=place, dtype=torch.bfloat16) * columns**-0.5

        inputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.embedding = matrix(shape.vocabulary, shape.hidden)
        self.layers = [
            (
                matrix(inputs, shape.hidden),
                matrix(shape.hidden, shape.heads * shape.head_dim),
                matrix(2 * shape.inner, shape.hidden),
                matrix(shape.hidden, shape.inner),
            )
            for _ in range(shape.layers)
        ]

    def turned(self, values: torch.Tensor, first: int) -> torch.Tensor:
        half = self.shape.head_dim // 2
        rates = 5e5 ** (-torch.arange(half, device=self.place, dtype=torch.float32) / half)
        angles = torch.arange(first, first + values.shape[0], device=self.place)[:, None] * rates
        cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
        left, right = values.float().split(half, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(values.dtype)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: torch.Tensor, known: int) -> torch.Tensor:
        """Scores after the last token. ``cache`` is (layer, k or v, position, head, dimension), ``known`` filled."""
        shape, count = self.shape, tokens.shape[0]
        mask = None
        if known:
            mask = torch.ones(count, known + count, device=self.place, dtype=torch.bool).tril(known)
        state = self.embedding[tokens]
        for layer, (inputs, output, gates, inner) in enumerate(self.layers):
            normal = functional.rms_norm(state, (shape.hidden,))
            heads = (normal @ inputs.T).view(count, -1, shape.head_dim)
            queries, keys, values = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            cache[layer, 0, known : known + count] = self.turned(keys, known)
            cache[layer, 1, known : known + count] = values
            spread = shape.heads // shape.kv_heads
            keys, values = (part[: known + count].repeat_interleave(spread, dim=1) for part in cache[layer])
            attended = functional.scaled_dot_product_attention(
                self.turned(queries, known).transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None,
            )
            state = state + attended[0].transpose(0, 1).reshape(count, -1) @ output.T
            gate, up = (functional.rms_norm(state, (shape.hidden,)) @ gates.T).chunk(2, dim=-1)
            state = state + (functional.silu(gate) * up) @ inner.T
        return functional.rms_norm(state[-1], (shape.hidden,)) @ self.embedding.T


def settle(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


class Daemon:
    """A ``terraced`` in a folder, which can be started again over what it has stored."""

    def __init__(self, program: Path, folder: Path, device: str, room: int) -> None:
        self.program, self.folder, self.socket = program, folder, folder / "lane.sock"
        (folder / "data").mkdir()
        (folder / "terraced.toml").write_text(
            f'data_dir = "{folder / "data"}"\nlane_socket = "{self.socket}"\ngrpc_listen = "127.0.0.1:0"\n'
            f'metrics_listen = "127.0.0.1:0"\npinned_bytes = "{room}"\npersist_delay_ms = 50\n'
            f'[[hbm]]\ndevice = "{device}"\nbytes = "{room}"\n'
            f'[[device]]\npath = "{folder / "data" / "nvme0.dat"}"\nbytes = "{2 * room}"\n'
        )
        self.start()

    def start(self) -> None:
        config = self.folder / "terraced.toml"
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen([self.program, "--config", config], stderr=log)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit("terraced does not start:\n" + (self.folder / "log").read_text())
            try:
                terrace_kv.connect(self.socket).close()
                return
            except terrace_kv.TerraceError:
                time.sleep(0.05)
        sys.exit("terraced does not get ready")

    def stop(self) -> None:
        """It flushes what is not on the drive yet."""
        self.process.terminate()
        self.process.wait(PATIENCE)

    def again(self) -> None:
        self.stop()
        self.start()


class Scenario:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.shape = SHAPES[arguments.shape]
        self.device = terrace_kv.open_device(arguments.device)
        self.place = torch.device("cpu" if arguments.device == "host-only" else arguments.device)
        self.model = Model(self.shape, self.place)
        self.prefix = arguments.tokens // BLOCK_TOKENS * BLOCK_TOKENS
        tokens = [(at * 7919) % self.shape.vocabulary for at in range(self.prefix + BLOCK_TOKENS)]
        self.tokens = torch.tensor(tokens, device=self.place)
        self.keys = terrace_kv.chain_keys(tokens[: self.prefix], BLOCK_TOKENS)
        room = max(4 * self.shape.block_bytes() * len(self.keys) // 3, 512 << 20)
        self.daemon = Daemon(arguments.terraced, folder, arguments.device, -(-room // (64 << 20)) * (64 << 20))

    def cache(self) -> torch.Tensor:
        length = self.prefix + BLOCK_TOKENS
        parts = (self.shape.layers, 2, length, self.shape.kv_heads, self.shape.head_dim)
        return torch.zeros(parts, device=self.place, dtype=torch.bfloat16)

    def connect(self) -> tuple[terrace_kv.Session, terrace_kv.Space]:
        session = terrace_kv.connect(self.daemon.socket)
        manifest = terrace_kv.SpaceManifest(
            model=f"random {self.shape}",
            model_fingerprint=b"\x07",
            dtype="bf16",
            layout="layer,kv,slot,head,dim",
            tokens_per_block=BLOCK_TOKENS,
            block_bytes=self.shape.block_bytes(),
        )
        return session, session.open_space(manifest)

    def store(self, cache: torch.Tensor) -> None:
        """Seals the prefix's blocks on the device, some at a time."""
        session, space = self.connect()
        with session:
            for first in range(0, len(self.keys), 64):
                keys = self.keys[first : first + 64]
                parent = self.keys[first - 1] if first else None
                lease = session.lease_write_on(
                    self.device,
                    space,
                    keys,
                    parent=parent,
                    wait=PATIENCE,
                    dtype="bfloat16",
                    shape=self.shape.block(),
                )
                for at, block in enumerate(lease.blocks, first):
                    assert block is not None, lease.outcomes
                    span = slice(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS)
                    torch.from_dlpack(block).copy_(cache[:, :, span])
                settle(self.place)
                assert set(lease.seal()) <= {"sealed", "already"}
                lease.close()
            session.flush_windows()

    def computed(self) -> torch.Tensor:
        return self.model.forward(self.tokens, self.cache(), 0)

    def from_device(self) -> torch.Tensor:
        """Blocks leased on the device, wherever they were."""
        session, space = self.connect()
        with session:
            lease = session.lease_read_on(
                self.device,
                space,
                self.keys,
                wait=PATIENCE,
                purpose="prefill",
                dtype="bfloat16",
                shape=self.shape.block(),
            )
            blocks = [torch.from_dlpack(block) for block in lease.blocks if isinstance(block, terrace_kv.DeviceBlock)]
            assert len(blocks) == len(self.keys), f"{len(blocks)} of {len(self.keys)} blocks on the device"
            scores = self.go_on(blocks)
            settle(self.place)
            lease.check()
            del blocks
            lease.close()
        return scores

    def from_host(self) -> torch.Tensor:
        """Blocks leased in host memory, copied by torch."""
        session, space = self.connect()
        with session:
            lease = session.lease_read(space, self.keys, wait=PATIENCE)
            assert lease.prefix == len(self.keys), lease.outcomes
            flat = [torch.frombuffer(block, dtype=torch.bfloat16) for block in lease.blocks if block is not None]
            scores = self.go_on([part.view(self.shape.block()).to(self.place) for part in flat])
            settle(self.place)
            lease.check()
            del flat
            lease.close()
        return scores

    def go_on(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        cache = self.cache()
        torch.cat(blocks, dim=2, out=cache[:, :, : self.prefix])
        return self.model.forward(self.tokens[self.prefix :], cache, self.prefix)

    def run(self) -> None:
        cache = self.cache()
        self.model.forward(self.tokens[: self.prefix], cache, 0)
        self.store(cache)
        expected = self.computed()
        computed = self.figure("first_token_8192_computed", self.computed, expected)
        self.figure("first_token_8192_hbm", self.from_device, expected, computed)
        self.figure("first_token_8192_pinned", self.from_host, expected, computed)
        self.figure("first_token_8192_nvme", self.from_device, expected, computed, before=self.daemon.again)

    def figure(
        self,
        name: str,
        way: Callable[[], torch.Tensor],
        expected: torch.Tensor,
        computed: float | None = None,
        before: Callable[[], None] | None = None,
    ) -> float:
        times = []
        for _ in range(ROUNDS + 1):
            if before is not None:
                before()
            settle(self.place)
            began = time.perf_counter()
            scores = way()
            settle(self.place)
            times.append(time.perf_counter() - began)
            # Products of another shape add in another order: near, but not the same bits.
            torch.testing.assert_close(scores.float(), expected.float(), rtol=0.1, atol=0.1)
        median = statistics.median(times[1:])
        name = name if self.prefix == 8192 else name.replace("8192", str(self.prefix))
        line = {"name": name, "value": median, "unit": "s", "limit": computed}
        print(json.dumps(line), flush=True)
        return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--terraced", type=Path, required=True, help="the daemon's program")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or host-only to see that it runs")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prefix")
    parser.add_argument("--dir", type=Path, help="on the drive to be measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first", dir=arguments.dir) as folder:
        scenario = Scenario(arguments, Path(folder))
        try:
            scenario.run()
        finally:
            scenario.daemon.process.kill()


if __name__ == "__main__":
    main()
