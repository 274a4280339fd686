//! What became of each block of a lease, at fixed places: hundreds of them are written and read in a lease of microseconds,
//! of which their fields as messages would take a third.

/// Bytes of one.
pub const PACKED_GRANT_BYTES: usize = 56;

/// What became of one block, as in `BlockGrant`. Enums by their numbers; the length is that of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedGrant {
    /// Its id.
    pub block: [u8; 16],
    /// Chunk of the frame.
    pub chunk: u64,
    /// Of the payload in the chunk, in bytes.
    pub offset: u64,
    /// Fence of the frame.
    pub fence: u64,
    /// As sealed.
    pub checksum: u64,
    /// Index of the frame in the chunk.
    pub frame: u32,
    /// A `GrantOutcome`.
    pub outcome: u8,
    /// A `MissReason`.
    pub reason: u8,
    /// A `Tier`.
    pub tier: u8,
    /// Number of the device.
    pub device: u8,
}

impl PackedGrant {
    /// As on the wire.
    #[inline]
    pub fn to_bytes(&self) -> [u8; PACKED_GRANT_BYTES] {
        let mut bytes = [0; PACKED_GRANT_BYTES];
        bytes[..16].copy_from_slice(&self.block);
        bytes[16..24].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.fence.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.frame.to_le_bytes());
        bytes[52..].copy_from_slice(&[self.outcome, self.reason, self.tier, self.device]);
        bytes
    }

    /// From the wire. Any bytes are one.
    #[inline]
    pub fn from_bytes(bytes: &[u8; PACKED_GRANT_BYTES]) -> Self {
        let [block, rest @ ..] = bytes.as_chunks::<8>().0 else {
            unreachable!("56 bytes are seven times eight")
        };
        let [half, chunk, offset, fence, checksum, last] = rest else {
            unreachable!("56 bytes are seven times eight")
        };
        let [a, b, c, d, outcome, reason, tier, device] = *last;
        let mut id = [0; 16];
        id[..8].copy_from_slice(block);
        id[8..].copy_from_slice(half);
        Self {
            block: id,
            chunk: u64::from_le_bytes(*chunk),
            offset: u64::from_le_bytes(*offset),
            fence: u64::from_le_bytes(*fence),
            checksum: u64::from_le_bytes(*checksum),
            frame: u32::from_le_bytes([a, b, c, d]),
            outcome,
            reason,
            tier,
            device,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The places are the contract: clients in other languages read them too.
    #[test]
    fn each_field_has_its_place() {
        let bytes: [u8; PACKED_GRANT_BYTES] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        let grant = PackedGrant::from_bytes(&bytes);
        assert_eq!(grant.block[..], bytes[..16]);
        let words = [grant.chunk, grant.offset, grant.fence, grant.checksum];
        for (word, at) in words.into_iter().zip([16, 24, 32, 40]) {
            assert_eq!(word.to_le_bytes()[..], bytes[at..at + 8]);
        }
        assert_eq!(grant.frame.to_le_bytes()[..], bytes[48..52]);
        assert_eq!([grant.outcome, grant.reason, grant.tier, grant.device], [52, 53, 54, 55]);
        assert_eq!(grant.to_bytes(), bytes);
    }
}
