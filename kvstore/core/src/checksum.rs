//! The checksum that travels with every block: CRC-64/NVMe over a 32-byte seed
//! and the payload. Part of the wire contract: clients and devices compute the
//! same.

use crate::ids::BlockId;
use crate::units::ByteCount;

/// A block's checksum. The seed makes bytes that belong to another block, have
/// another length, or come from before a `Clear` fail it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checksum(u64);

impl Checksum {
    /// Wraps a raw checksum.
    #[inline]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw checksum, for the wire and the header page.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The polynomial of CRC-64/NVMe, lowest bit highest.
pub const CHECKSUM_POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// The shortest part that is summed apart from what is before it, for [`Checksummer::join`]. Longer ones are this doubled, so
/// often at most.
pub const JOINED_BYTES: usize = 64 << 10;
/// See [`JOINED_BYTES`].
pub const JOINED_DOUBLINGS_MAX: u32 = 5;

/// What moves a sum over a joined part, by its doublings: x to the power of its bits, which are 2 to the 19th and more.
const OVER_JOINED: [u64; JOINED_DOUBLINGS_MAX as usize + 1] = {
    assert!(JOINED_BYTES * 8 == 1 << 19);
    let (mut over, mut moved, mut squared) = ([0; JOINED_DOUBLINGS_MAX as usize + 1], 1 << 62, 0);
    while squared < 19 + over.len() {
        if squared >= 19 {
            over[squared - 19] = moved;
        }
        moved = product(moved, moved);
        squared += 1;
    }
    over
};

/// Of two polynomials, modulo that of the checksum.
const fn product(one: u64, other: u64) -> u64 {
    let (mut sum, mut moved, mut bit) = (0, other, 64);
    while bit > 0 {
        bit -= 1;
        if one >> bit & 1 == 1 {
            sum ^= moved;
        }
        moved = if moved & 1 == 1 { moved >> 1 ^ CHECKSUM_POLYNOMIAL } else { moved >> 1 };
    }
    sum
}

/// Computes a checksum over pieces. The digest is a few machine words.
#[derive(Clone, Debug)]
pub struct Checksummer(crc_fast::Digest);

impl Checksummer {
    /// Starts with the seed: 16 bytes of block id, length and generation as
    /// little-endian u64.
    pub fn new(block: BlockId, length: ByteCount, generation: u64) -> Self {
        let mut seed = [0u8; 32];
        seed[..16].copy_from_slice(&block.to_bytes());
        seed[16..24].copy_from_slice(&length.get().to_le_bytes());
        seed[24..].copy_from_slice(&generation.to_le_bytes());
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        digest.update(&seed);
        Self(digest)
    }

    /// For a part of a payload that another sum will [`join`](Self::join).
    #[must_use]
    pub fn of_part() -> Self {
        Self(crc_fast::Digest::new_with_init_state(crc_fast::CrcAlgorithm::Crc64Nvme, 0))
    }

    /// Adds the next [`JOINED_BYTES`] of the payload, or as much doubled so often, which were summed as a part.
    ///
    /// # Panics
    /// If that is more often than [`JOINED_DOUBLINGS_MAX`].
    pub fn join(&mut self, part: &Self, doublings: u32) {
        let state = product(self.state(), OVER_JOINED[doublings as usize]) ^ part.state();
        self.0 = crc_fast::Digest::new_with_init_state(crc_fast::CrcAlgorithm::Crc64Nvme, state);
    }

    /// Adds the next piece of the payload.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// What came so far, for code that folds it together with the next pieces.
    pub fn state(&self) -> u64 {
        self.0.get_state()
    }

    /// Goes on behind such code. `left` are bytes whose sum, begun with nothing, is that of everything so far.
    #[must_use]
    pub fn from_folded(left: &[u8]) -> Self {
        let mut digest = crc_fast::Digest::new_with_init_state(crc_fast::CrcAlgorithm::Crc64Nvme, 0);
        digest.update(left);
        Self(digest)
    }

    /// The checksum of seed and payload.
    pub fn finish(self) -> Checksum {
        Checksum(self.0.finalize())
    }
}

/// The checksum of a whole payload.
pub fn checksum(block: BlockId, generation: u64, payload: &[u8]) -> Checksum {
    let mut summer = Checksummer::new(block, ByteCount::new(payload.len() as u64), generation);
    summer.update(payload);
    summer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    // Parts that are summed by several threads must have the sum that everybody else computes.
    #[test]
    fn joined_parts_are_the_whole() {
        let block = BlockId::from_bytes([3; 16]);
        for (head, doublings) in [(0, 0), (1, 0), (777, 1), (JOINED_BYTES, JOINED_DOUBLINGS_MAX)] {
            let piece = JOINED_BYTES << doublings;
            let length = head + 3 * piece;
            let payload: Vec<u8> =
                (0..length).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[2]).collect();
            let mut summer = Checksummer::new(block, ByteCount::new(length as u64), 5);
            summer.update(&payload[..head]);
            for piece in payload[head..].chunks(piece) {
                let mut part = Checksummer::of_part();
                part.update(piece);
                summer.join(&part, doublings);
            }
            let whole = checksum(block, 5, &payload);
            assert_eq!(summer.finish(), whole, "behind {head} bytes, doubled {doublings} times");
        }
    }
}
