"""What vLLM does to a request: it cuts its prompt, takes its blocks away and gives it others, and names blocks by more
than their tokens. With vLLM's own requests and hashes. Skipped where there is no vLLM."""

from typing import Any

import pytest
from conftest import Daemon

torch = pytest.importorskip("torch", reason="torch is not installed: the vLLM connector is not tested here")
pytest.importorskip("vllm", reason="vLLM is not installed: its connector is not tested here (make test-vllm does)")

from test_vllm import TOKENS, Engine  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256_cbor  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
BLOCKS = 4


@pytest.fixture
def engine(daemon: Daemon) -> Any:
    running = Engine(daemon.socket)
    yield running
    running.stop()


def request(name: str, **what: Any) -> Request:
    """Always the same prompt, of four blocks and a token."""
    init_none_hash(sha256_cbor)
    return Request(
        name,
        list(range(BLOCKS * TOKENS + 1)),
        SamplingParams(max_tokens=1),
        None,
        block_hasher=get_request_block_hasher(TOKENS, sha256_cbor),
        **what,
    )


def image(identifier: str) -> MultiModalFeatureSpec:
    """In the second block."""
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=TOKENS + 3, length=8))


def test_names_of_a_prompt_are_not_its_tokens_alone(engine: Engine) -> None:
    """Equal tokens of another salt, adapter or image are served: each of them stores, and finds only its own."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "salt": {"cache_salt": "a"},
        "another salt": {"cache_salt": "b"},
        "adapter": {"lora_request": LoRARequest("one", 1, "/one")},
        "another adapter": {"lora_request": LoRARequest("two", 2, "/two")},
        "image": {"mm_features": [image("first")]},
        "another image": {"mm_features": [image("second")]},
    }
    # An image is behind the first block, which is that of the plain prompt.
    before = {"image": TOKENS, "another image": TOKENS}
    for place, (name, what) in enumerate(ways.items()):
        assert engine.match(request(f"{name} new", **what)) == before.get(name, 0), name
        blocks = list(range(place * (BLOCKS + 1), (place + 1) * (BLOCKS + 1)))
        there = engine.fill(blocks[:BLOCKS], seed=place)
        stored = engine.sums.get("blocks_stored", 0)
        engine.save(request(f"{name} saved", **what), blocks)
        engine.until("blocks_stored", stored + BLOCKS - before.get(name, 0) // TOKENS)
        targets = list(range(50, 50 + BLOCKS))
        assert engine.load(request(f"{name} loaded", **what), [*targets, 49]) == set(), name
        for layer, cache in engine.caches.items():
            shared = before.get(name, 0) // TOKENS
            assert torch.equal(cache[targets[shared:]], there[layer][shared:]), (name, layer)


def test_a_prompt_that_is_cut_into_steps(engine: Engine) -> None:
    """A chunk of a prompt ends inside a block: the block is stored once, when it is full, with all of its bytes."""
    cut = request("cut")
    blocks = list(range(BLOCKS + 1))
    engine.allocate(cut, blocks[:2], 0)
    there = engine.fill(blocks[:1], seed=1)
    engine.step(cut, tuple(blocks[:2]), TOKENS + 5)
    engine.until("blocks_stored", 1)
    assert engine.match(request("early")) == TOKENS
    rest = engine.fill(blocks[1:BLOCKS], seed=2)
    engine.continued(cut, blocks[2:], (BLOCKS - 1) * TOKENS - 4)
    engine.until("blocks_stored", BLOCKS)
    targets = list(range(20, 20 + BLOCKS))
    assert engine.load(request("whole"), [*targets, 30]) == set()
    for layer, cache in engine.caches.items():
        assert torch.equal(cache[20:21], there[layer])
        assert torch.equal(cache[21 : 20 + BLOCKS], rest[layer])
    assert engine.sums["blocks_stored"] == BLOCKS


def test_a_request_that_is_preempted_goes_on_elsewhere(engine: Engine) -> None:
    """Preempted, a request loses its blocks and comes back with others: what is stored then is in the new ones, and
    what another request did to the old ones is not."""
    first = request("first")
    old, new = list(range(BLOCKS + 1)), list(range(10, 11 + BLOCKS))
    engine.allocate(first, old[:2], 0)
    there = engine.fill(old[:1], seed=1)
    engine.step(first, tuple(old[:2]), TOKENS + 5)
    engine.until("blocks_stored", 1)
    engine.fill(old, seed=3)
    first.num_computed_tokens = 0
    assert engine.match(first) == TOKENS
    engine.allocate(first, new, 0)
    again = engine.fill(new[:BLOCKS], seed=2)
    engine.continued(first, new, BLOCKS * TOKENS, resumed=True)
    engine.until("blocks_stored", BLOCKS)
    targets = list(range(20, 20 + BLOCKS))
    assert engine.load(request("other"), [*targets, 30]) == set()
    for layer, cache in engine.caches.items():
        # The first block was stored before; the same prompt has the same bytes, which here are told apart.
        assert torch.equal(cache[20:21], there[layer])
        assert torch.equal(cache[21 : 20 + BLOCKS], again[layer][1:])


def test_a_request_that_is_aborted(engine: Engine, daemon: Daemon) -> None:
    """Aborted while its blocks are leased for it, or after it had them: nothing stays leased, nothing is stored."""
    engine.fill(list(range(BLOCKS)), seed=1)
    engine.save(request("a"), list(range(BLOCKS + 1)))
    engine.until("blocks_stored", BLOCKS)
    asked = request("asked")
    assert engine.match(asked) == BLOCKS * TOKENS
    engine.scheduler.request_finished_all_groups(asked, ([],))
    daemon.expect_leases(0)
    running = request("running", cache_salt="other")
    assert engine.match(running) == 0
    engine.allocate(running, [20, 21], 0)
    engine.scheduler.request_finished_all_groups(running, ([20, 21],))
    engine.step()
    assert engine.match(request("again", cache_salt="other")) == 0
