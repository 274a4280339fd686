//! Block ids of many keys at once.
//!
//! A request names hundreds of blocks by keys of a few bytes, and each id is a keyed BLAKE3 of its own: one short block
//! of the hash, in which every step waits for the one before it. Eight or sixteen of them side by side take hardly
//! longer than one. What comes out is what [`TenantKey::block_id`] says, key by key.

#[cfg(target_arch = "x86_64")]
mod wide;

use terrace_core::{BlockId, SpaceId, TenantKey};

/// Bytes of one block of the hash. What is longer with the space before it takes two, and is hashed by itself.
const BLOCK_BYTES: usize = 64;
const SPACE_BYTES: usize = 16;
const SPACE_WORDS: usize = SPACE_BYTES / 4;
/// Words of the block that the key may fill.
const NAME_WORDS: usize = (BLOCK_BYTES - SPACE_BYTES) / 4;
/// Fewer are hashed one by one.
const MANY: usize = 3;

/// The ids of the blocks that have these keys in a space, in order.
pub fn block_ids(key: &TenantKey, space: SpaceId, names: &[impl AsRef<[u8]>]) -> Vec<BlockId> {
    let lanes = lanes();
    let mut ids = Vec::with_capacity(names.len());
    for names in names.chunks(lanes) {
        let short = names.iter().all(|name| name.as_ref().len() <= NAME_WORDS * 4);
        if names.len() >= MANY && short {
            side_by_side(key, space, names, lanes, &mut ids);
        } else {
            ids.extend(names.iter().map(|name| key.block_id(space, name.as_ref())));
        }
    }
    ids
}

/// Keys word by word, so that one word of all of them is one load: those of sixteen, or of eight.
struct Names<const LANES: usize> {
    words: [[u32; LANES]; NAME_WORDS],
    lengths: [u32; LANES],
}

impl<const LANES: usize> Names<LANES> {
    /// At most as many as there are lanes, none longer than a block has room for.
    fn of(names: &[impl AsRef<[u8]>]) -> Self {
        let mut all = Self { words: [[0; LANES]; NAME_WORDS], lengths: [0; LANES] };
        for (lane, name) in names.iter().enumerate() {
            let name = name.as_ref();
            let (whole, rest) = name.as_chunks::<4>();
            for (word, bytes) in all.words.iter_mut().zip(whole) {
                word[lane] = u32::from_le_bytes(*bytes);
            }
            if !rest.is_empty() {
                let mut padded = [0; 4];
                padded[..rest.len()].copy_from_slice(rest);
                all.words[whole.len()][lane] = u32::from_le_bytes(padded);
            }
            all.lengths[lane] =
                u32::try_from(SPACE_BYTES + name.len()).expect("a block of the hash is short");
        }
        all
    }
}

/// Words of 16 or 32 bytes, as the hash reads them.
fn words<const COUNT: usize>(bytes: &[u8]) -> [u32; COUNT] {
    let mut words = [0; COUNT];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// The first so many ids, from the first four words of all hashes.
fn push_ids<const LANES: usize>(hashes: &[[u32; LANES]; 4], count: usize, ids: &mut Vec<BlockId>) {
    let [one, two, three, four] = hashes;
    ids.extend((0..count).map(|lane| {
        let halves =
            [[one, two], [three, four]].map(|[low, high]| u64::from(low[lane]) | u64::from(high[lane]) << 32);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&halves[0].to_le_bytes());
        bytes[8..].copy_from_slice(&halves[1].to_le_bytes());
        BlockId::from_bytes(bytes)
    }));
}

/// Keys that are hashed at once on this processor.
#[cfg(target_arch = "x86_64")]
fn lanes() -> usize {
    match wide::best() {
        Some(wide::Best::Avx512) => 16,
        Some(wide::Best::Avx2) | None => 8,
    }
}

#[cfg(target_arch = "x86_64")]
fn side_by_side(
    key: &TenantKey,
    space: SpaceId,
    names: &[impl AsRef<[u8]>],
    lanes: usize,
    ids: &mut Vec<BlockId>,
) {
    assert!(names.len() <= lanes, "not more keys than lanes");
    let (secret, head) = (words(&key.to_bytes()), words(&space.to_bytes()));
    match wide::best() {
        Some(wide::Best::Avx512) => {
            // SAFETY: the processor was asked.
            let hashes = unsafe { wide::hash_16(&secret, &head, &Names::of(names)) };
            push_ids(&hashes, names.len(), ids);
        }
        Some(wide::Best::Avx2) => {
            // SAFETY: the processor was asked.
            let hashes = unsafe { wide::hash_8(&secret, &head, &Names::of(names)) };
            push_ids(&hashes, names.len(), ids);
        }
        None => ids.extend(names.iter().map(|name| key.block_id(space, name.as_ref()))),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn lanes() -> usize {
    8
}

#[cfg(not(target_arch = "x86_64"))]
fn side_by_side(
    key: &TenantKey,
    space: SpaceId,
    names: &[impl AsRef<[u8]>],
    _: usize,
    ids: &mut Vec<BlockId>,
) {
    ids.extend(names.iter().map(|name| key.block_id(space, name.as_ref())));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(length: usize, seed: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 7 + seed * 31).wrapping_mul(0x9e37_79b9).to_le_bytes()[2]).collect()
    }

    // An id that is not the hash of its key is another block's place: what is hashed side by side is compared with the
    // hash of each, for every length that a key may have and for counts around those that go together.
    #[test]
    fn ids_are_those_of_each_key_alone() {
        let key = TenantKey::from_bytes([0xA5; 32]);
        let space = SpaceId::from_bytes([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]);
        for length in 1..=64 {
            for count in [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33] {
                let names: Vec<Vec<u8>> = (0..count).map(|at| name(length, at)).collect();
                let alone: Vec<BlockId> = names.iter().map(|name| key.block_id(space, name)).collect();
                assert_eq!(block_ids(&key, space, &names), alone, "{count} of {length} bytes");
            }
        }
        let mixed: Vec<Vec<u8>> = (1..=64).map(|length| name(length, length)).collect();
        let alone: Vec<BlockId> = mixed.iter().map(|name| key.block_id(space, name)).collect();
        assert_eq!(block_ids(&key, space, &mixed), alone);
    }

    // A processor that can do more must not hide a mistake in what the others use.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn both_widths_agree() {
        if wide::best().is_none() || !std::arch::is_x86_feature_detected!("avx2") {
            println!("skipped: this processor has no AVX2");
            return;
        }
        let key = TenantKey::from_bytes([9; 32]);
        let space = SpaceId::from_bytes([8; 16]);
        let names: Vec<Vec<u8>> = (0..8).map(|at| name(1 + at * 6, at)).collect();
        let (secret, head) = (words(&key.to_bytes()), words(&space.to_bytes()));
        let mut ids = Vec::new();
        // SAFETY: the processor was asked.
        push_ids(&unsafe { wide::hash_8(&secret, &head, &Names::of(&names)) }, names.len(), &mut ids);
        let alone: Vec<BlockId> = names.iter().map(|name| key.block_id(space, name)).collect();
        assert_eq!(ids, alone);
    }
}
