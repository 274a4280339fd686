//! Sums on the device are those of the host.

use terrace_core::{BlockId, checksum};
use terrace_gpudirect::kernels::{KernelError, Summer};

use crate::queues;

fn payload(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn id(number: u8) -> BlockId {
    BlockId::from_bytes([number; 16])
}

/// A seam between threads, rows or groups, a wrong power, or a first word in the wrong place would give a sum that no
/// client computes: lengths around every seam, several blocks in one launch, are compared with the host's sum.
#[test]
fn sums_are_those_of_the_host() {
    // A word, a row of 2 KiB, a group of 64 KiB, each with neighbours; SmolLM2's block; 2 MiB.
    let lengths = [8, 16, 2040, 2048, 2056, 4104, 65_528, 65_536, 65_544, 131_072 + 8, 368_640, 2 << 20];
    for queue in queues() {
        let summer = Summer::new(queue.clone()).unwrap();
        for length in lengths {
            let blocks: Vec<_> = (0..3u8)
                .map(|number| {
                    let bytes = payload(length, u64::from(number) * 77 + length as u64);
                    let memory = queue.allocate(length).unwrap();
                    queue.write(&memory, &bytes).unwrap();
                    (id(number), memory, bytes)
                })
                .collect();
            let given: Vec<_> = blocks.iter().map(|(id, memory, _)| (*id, memory.clone())).collect();
            let found = summer.checksums(&given, 5).unwrap();
            for ((id, _, bytes), found) in blocks.iter().zip(found) {
                assert_eq!(found, checksum(*id, 5, bytes), "{length} bytes on {}", queue.describe());
            }
        }
    }
}

/// One changed bit anywhere must change the sum: flip one in the first, a middle and the last byte.
#[test]
fn a_changed_bit_changes_the_sum() {
    for queue in queues() {
        let summer = Summer::new(queue.clone()).unwrap();
        let bytes = payload(70_000, 3);
        let sum = |bytes: &[u8]| {
            let memory = queue.allocate(bytes.len()).unwrap();
            queue.write(&memory, bytes).unwrap();
            summer.checksums(&[(id(1), memory)], 1).unwrap()[0]
        };
        let whole = sum(&bytes);
        for at in [0, 35_001, 69_999] {
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            assert_ne!(sum(&changed), whole, "byte {at}");
        }
    }
}

/// What the kernel cannot read must be refused before it is launched: odd lengths, odd addresses, unequal blocks.
#[test]
fn odd_payloads_are_refused() {
    for queue in queues() {
        let summer = Summer::new(queue.clone()).unwrap();
        let memory = queue.allocate(64).unwrap();
        let refused = |parts: &[(usize, usize)]| {
            let part = |(offset, length): &(usize, usize)| (id(1), memory.part(*offset, *length).unwrap());
            let blocks: Vec<_> = parts.iter().map(part).collect();
            matches!(summer.checksums(&blocks, 1), Err(KernelError::BadJob { .. }))
        };
        assert!(refused(&[(0, 0)]), "nothing");
        assert!(refused(&[(0, 12)]), "half a word");
        assert!(refused(&[(4, 16)]), "between words");
        assert!(refused(&[(0, 16), (16, 8)]), "two lengths");
        assert!(!refused(&[(0, 16), (16, 16)]), "what it can read");
        assert!(memory.part(60, 8).is_err(), "behind the end");
    }
}
