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
