//! Blocks and pages hold the same elements, in every layout of an engine.
//!
//! The reference names elements by their indexes in the engine's tensor, as the engine's own code does. It knows no
//! strides.

use std::ops::Range;
use std::sync::Arc;

use terrace_gpudirect::kernels::{
    BlockShape, BlockTokens, EnginePages, KernelBytes, KernelError, KernelQueue, Mover, PageLayout,
};

use crate::queues;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// `k[page][slot][head][dim]` and `v[...]`: SGLang.
    NhdTwoTensors,
    /// `kv[2][page][slot][head][dim]`: vLLM with FlashAttention.
    NhdApart,
    /// `kv[page][2][slot][head][dim]`: vLLM with FlashInfer, NHD.
    NhdTogether,
    /// `kv[2][page][head][slot][dim]`.
    HndApart,
    /// `kv[page][2][head][slot][dim]`: vLLM with FlashInfer, HND.
    HndTogether,
    /// `kv[page][head][slot][2 * dim]`: vLLM's common view.
    HndRows,
}

const ENGINES: [Engine; 6] = [
    Engine::NhdTwoTensors,
    Engine::NhdApart,
    Engine::NhdTogether,
    Engine::HndApart,
    Engine::HndTogether,
    Engine::HndRows,
];

#[derive(Clone, Copy, Debug)]
struct Case {
    engine: Engine,
    shape: BlockShape,
    pages: u32,
    page_slots: u32,
}

fn size(number: u32) -> usize {
    usize::try_from(number).unwrap()
}

/// A byte that depends on everything that names it.
fn value(layer: usize, half: usize, token: usize, head: usize, byte: usize) -> u8 {
    let mixed = [layer, half, token, head, byte].iter().fold(0u64, |hash, part| {
        (hash ^ (*part as u64 + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
    });
    mixed.to_le_bytes()[3]
}

impl Case {
    fn layout(self) -> PageLayout {
        let (shape, pages, slots) = (self.shape, self.pages, self.page_slots);
        match self.engine {
            Engine::NhdTwoTensors | Engine::NhdApart => PageLayout::nhd_apart(shape, pages, slots),
            Engine::NhdTogether => PageLayout::nhd_together(shape, pages, slots),
            Engine::HndApart => PageLayout::hnd_apart(shape, pages, slots),
            Engine::HndTogether => PageLayout::hnd_together(shape, pages, slots),
            Engine::HndRows => PageLayout::hnd_rows_together(shape, pages, slots),
        }
    }

    /// The tensor (of one or two) and the first byte in it of a token's head.
    fn place(self, half: usize, token: usize, head: usize) -> (usize, usize) {
        let (slots, heads) = (size(self.page_slots), size(self.shape.kv_heads));
        let row = size(self.shape.head_dim * self.shape.element_bytes);
        let (pages, page, slot) = (size(self.pages), token / slots, token % slots);
        match self.engine {
            Engine::NhdTwoTensors => (half, ((page * slots + slot) * heads + head) * row),
            Engine::NhdApart => (0, (((half * pages + page) * slots + slot) * heads + head) * row),
            Engine::NhdTogether => (0, (((page * 2 + half) * slots + slot) * heads + head) * row),
            Engine::HndApart => (0, (((half * pages + page) * heads + head) * slots + slot) * row),
            Engine::HndTogether => (0, (((page * 2 + half) * heads + head) * slots + slot) * row),
            Engine::HndRows => (0, (((page * heads + head) * slots + slot) * 2 + half) * row),
        }
    }

    fn tensors(self) -> usize {
        if self.engine == Engine::NhdTwoTensors { 2 } else { 1 }
    }

    fn tensor_bytes(self) -> usize {
        let row = size(self.shape.kv_heads * self.shape.head_dim * self.shape.element_bytes);
        2 / self.tensors() * size(self.pages * self.page_slots) * row
    }

    /// The engine's tensors, `[layer][tensor]`: `tokens` are filled, the rest is 0xEE.
    fn engine(self, tokens: &[usize]) -> Vec<Vec<Vec<u8>>> {
        let row = size(self.shape.head_dim * self.shape.element_bytes);
        let mut layers = vec![vec![vec![0xEE; self.tensor_bytes()]; self.tensors()]; size(self.shape.layers)];
        for (layer, tensors) in layers.iter_mut().enumerate() {
            for token in tokens {
                for (half, head) in
                    (0..2).flat_map(|half| (0..size(self.shape.kv_heads)).map(move |head| (half, head)))
                {
                    let (tensor, at) = self.place(half, *token, head);
                    for byte in 0..row {
                        tensors[tensor][at + byte] = value(layer, half, *token, head, byte);
                    }
                }
            }
        }
        layers
    }

    /// The block that holds these tokens: `[layer][k or v][slot][head][dim]`.
    fn block(self, tokens: &[usize], layers: Range<usize>) -> Vec<u8> {
        let row = size(self.shape.head_dim * self.shape.element_bytes);
        let mut bytes = Vec::new();
        for layer in 0..size(self.shape.layers) {
            for half in 0..2 {
                for token in tokens {
                    for head in 0..size(self.shape.kv_heads) {
                        let filled = layers.contains(&layer);
                        bytes.extend(
                            (0..row).map(
                                |byte| {
                                    if filled { value(layer, half, *token, head, byte) } else { 0xCC }
                                },
                            ),
                        );
                    }
                }
            }
        }
        bytes
    }
}

/// What a case needs on a queue. Memory has a margin of 0xAB behind it.
struct Bench {
    queue: Arc<dyn KernelQueue>,
    case: Case,
    mover: Mover,
    tensors: Vec<Vec<KernelBytes>>,
    margins: Vec<KernelBytes>,
}

const MARGIN: usize = 64;

impl Bench {
    fn new(queue: &Arc<dyn KernelQueue>, case: Case, tensors: &[Vec<Vec<u8>>]) -> Self {
        let mut margins = Vec::new();
        let mut put = |bytes: &Vec<u8>| guarded(queue, bytes, &mut margins);
        let tensors: Vec<Vec<KernelBytes>> =
            tensors.iter().map(|layer| layer.iter().map(&mut put).collect()).collect();
        let pages = if case.tensors() == 2 {
            let layers = tensors.iter().map(|layer| [layer[0].clone(), layer[1].clone()]).collect();
            EnginePages { layout: case.layout(), layers }
        } else {
            let layers: Vec<KernelBytes> = tensors.iter().map(|layer| layer[0].clone()).collect();
            EnginePages::in_one_tensor(case.layout(), &layers).unwrap()
        };
        let mover = Mover::new(queue.clone(), case.shape, pages).unwrap();
        Self { queue: queue.clone(), case, mover, tensors, margins }
    }

    fn block(&mut self, bytes: &[u8], tokens: &[usize]) -> BlockTokens {
        let step = size(self.mover.run_slots());
        let runs = tokens.iter().step_by(step).map(|token| u32::try_from(*token).unwrap()).collect();
        BlockTokens { block: guarded(&self.queue, bytes, &mut self.margins), runs }
    }

    fn read(&self, bytes: &KernelBytes) -> Vec<u8> {
        let mut found = vec![0; bytes.len()];
        self.queue.read(bytes, &mut found).unwrap();
        found
    }

    fn engine(&self) -> Vec<Vec<Vec<u8>>> {
        self.tensors.iter().map(|layer| layer.iter().map(|bytes| self.read(bytes)).collect()).collect()
    }

    fn check_margins(&self) {
        for margin in &self.margins {
            assert!(
                self.read(margin).iter().all(|byte| *byte == 0xAB),
                "bytes behind memory: {:?}",
                self.case
            );
        }
    }
}

fn guarded(queue: &Arc<dyn KernelQueue>, bytes: &[u8], margins: &mut Vec<KernelBytes>) -> KernelBytes {
    let memory = queue.allocate(bytes.len() + MARGIN).unwrap();
    queue.write(&memory, &[bytes, &[0xAB; MARGIN]].concat()).unwrap();
    margins.push(memory.part(bytes.len(), MARGIN).unwrap());
    memory.part(0, bytes.len()).unwrap()
}

/// Tokens of two blocks: runs that lie anywhere, none where the next one would be.
fn tokens(case: Case, run: usize) -> Vec<Vec<usize>> {
    let slots = size(case.shape.slots);
    let all = size(case.pages * case.page_slots) / run;
    let coprime =
        |step: usize| (2..=step).all(|factor| !(step.is_multiple_of(factor) && all.is_multiple_of(factor)));
    let step = (1..all - 1).rev().find(|step| coprime(*step)).unwrap_or(1);
    let runs: Vec<usize> = (0..2 * slots / run).map(|index| (index * step + 1) % all * run).collect();
    let of_runs = |runs: &[usize]| runs.iter().flat_map(|first| *first..first + run).collect();
    runs.chunks(slots / run).map(of_runs).collect()
}

fn round_trip(queue: &Arc<dyn KernelQueue>, case: Case) {
    let layers = case.shape.layers;
    let run = size(Bench::new(queue, case, &case.engine(&[])).mover.run_slots());
    let tokens = tokens(case, run);
    let all: Vec<usize> = tokens.iter().flatten().copied().collect();
    let filled = case.engine(&all);

    let mut bench = Bench::new(queue, case, &filled);
    let empty = vec![0xCC; usize::try_from(case.shape.block_bytes()).unwrap()];
    let blocks: Vec<_> = tokens.iter().map(|tokens| bench.block(&empty, tokens)).collect();
    // SAFETY: blocks and pages live until the reads below have waited.
    unsafe { bench.mover.prepare(&blocks).unwrap().gather(0..layers) }.unwrap();
    for (block, tokens) in blocks.iter().zip(&tokens) {
        assert!(bench.read(&block.block) == case.block(tokens, 0..size(layers)), "gather: {case:?}");
    }
    assert!(bench.engine() == filled, "gathering changed the pages: {case:?}");
    bench.check_margins();

    let mut bench = Bench::new(queue, case, &case.engine(&[]));
    let blocks: Vec<_> =
        tokens.iter().map(|tokens| bench.block(&case.block(tokens, 0..size(layers)), tokens)).collect();
    // SAFETY: as above.
    unsafe { bench.mover.prepare(&blocks).unwrap().scatter(0..layers) }.unwrap();
    assert!(bench.engine() == filled, "scatter: {case:?}");
    bench.check_margins();
}

fn shape(layers: u32, slots: u32, kv_heads: u32, head_dim: u32, element_bytes: u32) -> BlockShape {
    BlockShape { layers, slots, kv_heads, head_dim, element_bytes }
}

/// An element in the wrong place, in any layout, is a wrong answer that nothing notices: fill pages by the engine's
/// own indexes, gather, compare with the block by its indexes, scatter back, and look at every byte of the pages.
/// Heads of odd sizes take the narrow kernels; pages of a token, of a block, of more and of less than one, every way
/// to cut runs.
#[test]
fn every_layout_goes_both_ways() {
    let shapes = [
        (shape(3, 16, 3, 64, 2), 16),
        (shape(2, 16, 2, 128, 1), 1),
        (shape(2, 16, 4, 32, 2), 64),
        (shape(1, 64, 2, 16, 2), 16),
        (shape(2, 32, 1, 64, 2), 48),
        (shape(2, 16, 3, 20, 1), 16),
        (shape(2, 16, 3, 7, 1), 32),
        (shape(1, 12, 2, 5, 2), 8),
        (shape(2, 1, 1, 576, 2), 64),
    ];
    for queue in queues() {
        for engine in ENGINES {
            for (shape, page_slots) in shapes {
                let pages = (3 * shape.slots).div_ceil(page_slots) + 2;
                round_trip(&queue, Case { engine, shape, pages, page_slots });
            }
        }
    }
}

/// Large shapes could overflow what small ones do not: Llama-3-8B, 70B cut eightfold, and SmolLM2 as vLLM's CPU build
/// lays it out (a block of a layer is 24,576 bytes).
#[test]
fn known_models_go_both_ways() {
    let vllm = shape(30, 32, 3, 64, 2);
    assert_eq!((vllm.half_bytes() * 2, vllm.block_bytes()), (24_576, 737_280));
    let strides = PageLayout::hnd_rows_together(vllm, 1456, 32);
    assert_eq!((strides.page_stride, strides.head_stride, strides.slot_stride), (24_576, 8192, 256));
    for queue in queues() {
        for (shape, page_slots) in [
            (shape(32, 16, 8, 128, 2), 16),
            (shape(80, 16, 1, 128, 2), 16),
            (shape(80, 64, 1, 128, 1), 16),
            (vllm, 32),
        ] {
            for engine in [Engine::NhdTwoTensors, Engine::HndTogether, Engine::HndRows] {
                let pages = 2 * shape.slots / page_slots + 2;
                round_trip(&queue, Case { engine, shape, pages, page_slots });
            }
        }
    }
}

/// Layers are streamed while others are computed: a range must touch its own layers and no others.
#[test]
fn a_range_of_layers_touches_no_other() {
    let case = Case { engine: Engine::HndTogether, shape: shape(5, 16, 2, 32, 2), pages: 4, page_slots: 16 };
    for queue in queues() {
        let tokens: Vec<usize> = (32..48).collect();
        let mut bench = Bench::new(&queue, case, &case.engine(&tokens));
        let empty = vec![0xCC; usize::try_from(case.shape.block_bytes()).unwrap()];
        let block = bench.block(&empty, &tokens);
        // SAFETY: the block and the pages live until the read has waited.
        unsafe { bench.mover.prepare(std::slice::from_ref(&block)).unwrap().gather(1..3) }.unwrap();
        assert!(bench.read(&block.block) == case.block(&tokens, 1..3));
    }
}

/// A block that does not begin at a vector must still be moved whole, by narrower vectors.
#[test]
fn blocks_at_odd_addresses_are_moved() {
    let case = Case { engine: Engine::NhdTogether, shape: shape(2, 16, 2, 32, 2), pages: 4, page_slots: 16 };
    for queue in queues() {
        for skew in [1, 2, 4, 8] {
            let tokens: Vec<usize> = (16..32).collect();
            let bench = Bench::new(&queue, case, &case.engine(&tokens));
            let length = usize::try_from(case.shape.block_bytes()).unwrap();
            let memory = queue.allocate(length + skew).unwrap();
            let block = BlockTokens { block: memory.part(skew, length).unwrap(), runs: vec![16] };
            // SAFETY: the block and the pages live until the read has waited.
            unsafe { bench.mover.prepare(std::slice::from_ref(&block)).unwrap().gather(0..2) }.unwrap();
            assert!(bench.read(&block.block) == case.block(&tokens, 0..2), "skewed by {skew}");
        }
    }
}

/// A kernel writes wherever it is told to: what would leave the pages or the block is refused before.
#[test]
fn what_leaves_the_memory_is_refused() {
    let case = Case { engine: Engine::NhdApart, shape: shape(2, 16, 2, 32, 2), pages: 4, page_slots: 16 };
    for queue in queues() {
        let mut bench = Bench::new(&queue, case, &case.engine(&[]));
        let length = usize::try_from(case.shape.block_bytes()).unwrap();
        let good = bench.block(&vec![0; length], &(0..16).collect::<Vec<_>>());
        let refused = |block: BlockTokens, layers: Range<u32>| {
            // SAFETY: as above; nothing is started if it is refused.
            let moved = bench.mover.prepare(&[block]).and_then(|ready| unsafe { ready.gather(layers) });
            matches!(moved, Err(KernelError::BadJob { .. }))
        };
        assert!(refused(BlockTokens { runs: vec![64], ..good.clone() }, 0..2), "a page too many");
        assert!(refused(BlockTokens { runs: vec![8], ..good.clone() }, 0..2), "across two pages");
        assert!(refused(BlockTokens { runs: vec![0, 16], ..good.clone() }, 0..2), "a run too many");
        assert!(refused(
            BlockTokens { block: good.block.part(0, length - 16).unwrap(), ..good.clone() },
            0..2
        ));
        assert!(refused(good.clone(), 1..3), "a layer too many");
        assert!(!refused(good, 0..2), "what fits");
        let short = queue.allocate(case.tensor_bytes() - 2).unwrap();
        let pages = EnginePages::in_one_tensor(case.layout(), &[short.clone(), short]).unwrap();
        assert!(Mover::new(queue.clone(), case.shape, pages).is_err(), "pages that are too short");
    }
}
