//! The engine on a device gives the processor's bits. The kernels run on the host's
//! processor here, and on a device as well where there is one.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use terrace_core::ByteCount;
use terrace_gpudirect::kernels::{FailsAfter, KernelBytes, KernelError, KernelQueue, every_queue};
use terrace_gpudirect::{Device, DeviceBytes, DeviceError, HostOnly, copy_in};

use super::{ComputeDevice, DeviceModel, Engine, ForwardError, Model, Outcome, Scratch, Step, WantLogits};
use crate::kernels::memory::WriteBytes;
use crate::kv::{BLOCK_TOKENS, KvSequence};
use crate::tiny::TinyModel;

fn queues() -> Vec<Arc<dyn KernelQueue>> {
    static QUEUES: OnceLock<Vec<Arc<dyn KernelQueue>>> = OnceLock::new();
    QUEUES.get_or_init(|| every_queue().unwrap()).clone()
}

fn tiny(shape: TinyModel) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    shape.write(&path).unwrap();
    Arc::new(Model::open(&path).unwrap())
}

fn prompt(len: usize) -> Vec<u32> {
    (0..).map(|at: u32| at * 37 % 250).take(len).collect()
}

fn bits(logits: Option<&[f32]>) -> Vec<u32> {
    logits.unwrap().iter().map(|value| value.to_bits()).collect()
}

/// Computes the tokens in pieces of a length behind what the sequence holds, and returns the last scores.
fn compute(engine: &Engine, kv: &mut KvSequence, tokens: &[u32], piece: usize) -> Vec<u32> {
    let mut scratch = Scratch::new();
    kv.reserve_private(tokens.len());
    let known = kv.len();
    for tokens in tokens[known..].chunks(piece) {
        let mut steps = [Step { tokens, kv, logits: WantLogits::Last }];
        let outcome = engine.forward_batch(&mut scratch, &mut steps, &AtomicBool::new(false)).unwrap();
        assert_eq!(outcome, Outcome::Done);
    }
    bits(scratch.logits(0))
}

fn full_blocks(kv: &KvSequence) -> Vec<Vec<u8>> {
    (0..kv.len() / BLOCK_TOKENS).map(|index| kv.block_to_vec(index).unwrap()).collect()
}

// A block from a device must continue on a processor, and the other way round: however the prompt is cut, scores and
// full blocks are the same bits. Shapes with uneven tiles, one head for all, and a head for each.
#[test]
fn a_device_gives_the_bits_of_the_processor() {
    for (heads, kv_heads) in [(6, 2), (4, 4), (5, 1)] {
        let model = tiny(TinyModel { heads, kv_heads, ..TinyModel::default() });
        let tokens = prompt(75);
        let mut whole = KvSequence::new(model.geometry());
        let expected = compute(&Engine::Cpu(model.clone()), &mut whole, &tokens, 75);
        for queue in queues() {
            let device = DeviceModel::new(model.clone(), queue).unwrap();
            assert!(device.agrees(), "the trial compares the same bits");
            let engine = Engine::Device(Arc::new(device));
            for piece in [75, 13] {
                let mut kv = KvSequence::new(model.geometry());
                let found = compute(&engine, &mut kv, &tokens, piece);
                assert_eq!(found, expected, "scores of pieces of {piece} on {}", engine.describe());
                assert!(full_blocks(&kv) == full_blocks(&whole), "blocks of pieces of {piece}");
            }
        }
    }
}

/// A frame as it is leased on a device: a part of a chunk that another mapping of the same memory has filled. Where
/// kernels run on the host, the device is host memory too; on a GPU, the queue's own memory stands in for it.
fn frame(queue: &Arc<dyn KernelQueue>, bytes: &[u8]) -> KernelBytes {
    let length = ByteCount::new(bytes.len() as u64);
    let daemon = HostOnly::new(0, ByteCount::new(1 << 30)).unwrap();
    let chunk = daemon.create(ByteCount::new(4096 + bytes.len() as u64)).unwrap();
    if queue.reaches(&chunk) {
        let part = DeviceBytes::new(Arc::clone(&chunk), 4096, length).unwrap();
        copy_in(&daemon, bytes, &part, Duration::from_secs(10)).unwrap();
        let own = HostOnly::new(0, ByteCount::new(0)).unwrap();
        let mapped = own.import(chunk.export().unwrap(), chunk.bytes()).unwrap();
        let part = DeviceBytes::new(mapped, 4096, length).unwrap();
        return KernelBytes::lent(queue.as_ref(), &part, Arc::new(own)).unwrap();
    }
    let memory = queue.allocate(bytes.len()).unwrap();
    queue.write(&memory, bytes).unwrap();
    memory
}

// A prefix from the store must be as good as a computed one, wherever it lies: sealed blocks on the device in place,
// sealed blocks in host memory, and frames on the device that are filled in place and sealed there.
#[test]
fn a_prefix_on_the_device_gives_the_same_bits() {
    let model = tiny(TinyModel::default());
    let tokens = prompt(70);
    let mut whole = KvSequence::new(model.geometry());
    let expected = compute(&Engine::Cpu(model.clone()), &mut whole, &tokens, 70);
    let blocks = full_blocks(&whole);
    for queue in queues() {
        let engine = Engine::Device(Arc::new(DeviceModel::new(model.clone(), queue.clone()).unwrap()));
        for count in 1..=4 {
            let frames: Vec<KernelBytes> = blocks[..count].iter().map(|bytes| frame(&queue, bytes)).collect();
            let mut kv = KvSequence::new(model.geometry());
            for frame in &frames {
                kv.push_device_read(frame.clone()).unwrap();
            }
            let filled = frame(&queue, &vec![0; model.geometry().block_bytes()]);
            kv.push_device_write(filled.clone()).unwrap();
            assert_eq!(compute(&engine, &mut kv, &tokens, 70), expected, "{count} blocks on the device");
            for (frame, bytes) in frames.iter().zip(&blocks) {
                assert!(read(&queue, frame) == *bytes, "a sealed block was written");
            }
            if count < 4 {
                assert!(kv.is_sealable(count));
                assert!(kv.freeze(count).is_none(), "it is not in host memory");
                assert!(
                    read(&queue, &kv.freeze_on_device(count).unwrap()) == blocks[count],
                    "filled in place"
                );
                assert!(!kv.is_sealable(count));
            }

            let mut kv = KvSequence::new(model.geometry());
            for bytes in &blocks[..count] {
                let mut copy = WriteBytes::private(bytes.len());
                copy.copy_from(bytes);
                kv.push_read(copy.freeze()).unwrap();
            }
            assert_eq!(compute(&engine, &mut kv, &tokens, 70), expected, "{count} blocks in host memory");
            assert!(full_blocks(&kv) == blocks);
        }
    }
}

fn read(queue: &Arc<dyn KernelQueue>, bytes: &KernelBytes) -> Vec<u8> {
    let mut found = vec![0; bytes.len()];
    queue.read(bytes, &mut found).unwrap();
    found
}

// Sequences in one pass must not see each other, nor a token that is computed again its own sealed block change: run a
// chunk, a decode, a full hit and a step without scores together, and compare each with itself alone.
#[test]
fn a_batch_on_the_device_gives_the_same_bits() {
    let model = tiny(TinyModel::default());
    let cpu = Engine::Cpu(model.clone());
    for queue in queues() {
        let engine = Engine::Device(Arc::new(DeviceModel::new(model.clone(), queue).unwrap()));
        let known = [0usize, 20, 47, 16];
        let lengths = [40usize, 1, 1, 17];
        let mut alone = Vec::new();
        let mut sequences = Vec::new();
        let prompts: Vec<Vec<u32>> =
            known.iter().zip(lengths).map(|(known, length)| prompt(known + length)).collect();
        for (tokens, known) in prompts.iter().zip(known) {
            alone.push(compute(&cpu, &mut KvSequence::new(model.geometry()), tokens, 64));
            let mut kv = KvSequence::new(model.geometry());
            compute(&engine, &mut kv, tokens, 64);
            for index in 0..kv.len() / BLOCK_TOKENS {
                kv.freeze(index).unwrap();
            }
            kv.rewind(known);
            sequences.push(kv);
        }
        let before: Vec<_> = sequences.iter().map(|kv| kv.block_to_vec(0)).collect();
        let mut scratch = Scratch::new();
        let mut steps: Vec<Step<'_>> = sequences
            .iter_mut()
            .zip(&prompts)
            .map(|(kv, tokens)| Step { tokens: &tokens[kv.len()..], kv, logits: WantLogits::Last })
            .collect();
        steps[3].logits = WantLogits::No;
        let outcome = engine.forward_batch(&mut scratch, &mut steps, &AtomicBool::new(false)).unwrap();
        assert_eq!(outcome, Outcome::Done);
        for (step, expected) in alone.iter().enumerate().take(3) {
            assert_eq!(bits(scratch.logits(step)), *expected, "sequence {step}");
        }
        assert!(scratch.logits(3).is_none());
        let after: Vec<_> = sequences.iter().map(|kv| kv.block_to_vec(0)).collect();
        assert!(before == after, "sealed blocks stay");
    }
}

// The processor cannot reach device memory: it must refuse, not read it. And a device that is not there must be said,
// never replaced by the processor.
#[test]
fn what_cannot_be_computed_is_said() {
    let model = tiny(TinyModel::default());
    for queue in queues() {
        let mut kv = KvSequence::new(model.geometry());
        kv.push_device_read(frame(&queue, &vec![0; model.geometry().block_bytes()])).unwrap();
        kv.reserve_private(20);
        let mut steps = [Step { tokens: &[1], kv: &mut kv, logits: WantLogits::No }];
        let refused = model.forward_batch(&mut Scratch::new(), &mut steps, &AtomicBool::new(false));
        assert_eq!(refused, Err(ForwardError::OnDevice));
        assert!(kv.push_device_write(queue.allocate(8).unwrap()).is_err(), "a block of another size");
        assert!(
            kv.push_device_read(frame(&queue, &vec![0; model.geometry().block_bytes()])).is_err(),
            "a gap"
        );
    }
    match Engine::new(model, ComputeDevice::Cuda(4096)) {
        Err(ForwardError::Device(KernelError::Device(
            DeviceError::NoDriver { .. } | DeviceError::NoDevice { .. },
        ))) => {}
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("there is no such device"),
    }
    assert_eq!("cuda:3".parse(), Ok(ComputeDevice::Cuda(3)));
    assert_eq!("cpu".parse(), Ok(ComputeDevice::Cpu));
    assert_eq!("host-only".parse(), Ok(ComputeDevice::HostOnly));
    for text in ["cuda", "cuda:", "cuda:-1", "gpu:0", ""] {
        assert!(text.parse::<ComputeDevice>().is_err(), "{text}");
    }
}

// A pass that fails half-way must leave the sequence as long as it was, and the tokens must come out right when they are
// computed afterwards: let every launch in turn be the one that fails.
#[test]
fn a_failed_pass_leaves_the_sequence() {
    let model = tiny(TinyModel::default());
    let tokens = prompt(20);
    let expected = compute(&Engine::Cpu(model.clone()), &mut KvSequence::new(model.geometry()), &tokens, 20);
    let Some(queue) = queues().into_iter().next() else { return };
    let faulty = Arc::new(FailsAfter::new(queue, usize::MAX));
    let engine = Engine::Device(Arc::new(DeviceModel::new(model.clone(), faulty.clone()).unwrap()));
    let mut kv = KvSequence::new(model.geometry());
    kv.reserve_private(32);
    for launches in (0..).step_by(5) {
        faulty.allow(launches);
        let mut scratch = Scratch::new();
        let mut steps = [Step { tokens: &tokens, kv: &mut kv, logits: WantLogits::Last }];
        match engine.forward_batch(&mut scratch, &mut steps, &AtomicBool::new(false)) {
            Err(ForwardError::Device(KernelError::Device(DeviceError::Driver { .. }))) => {
                assert_eq!(kv.len(), 0)
            }
            Err(error) => panic!("{error}"),
            Ok(outcome) => {
                assert_eq!(outcome, Outcome::Done);
                assert!(launches > 30, "a pass over three layers is as many launches");
                assert_eq!(bits(scratch.logits(0)), expected);
                return;
            }
        }
    }
}
