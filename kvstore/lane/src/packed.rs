//! What became of each granted block of a lease, at fixed places: hundreds of them are written and read in a lease of
//! microseconds, of which their fields as messages would take a third. Each byte is copied twice by the kernel, and moves from
//! one core to another: what is the same for many, or known to whoever asked, is not among them.

/// Bytes of one.
pub const PACKED_GRANT_BYTES: usize = 16;

/// A granted block of `PackedGrants`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedGrant {
    /// As sealed.
    pub checksum: u64,
    /// The block's part of the fence.
    pub fence: u32,
    /// Index of the frame in the chunk.
    pub frame: u32,
}

impl PackedGrant {
    /// As on the wire.
    #[inline]
    pub fn to_bytes(&self) -> [u8; PACKED_GRANT_BYTES] {
        let mut bytes = [0; PACKED_GRANT_BYTES];
        bytes[..8].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.fence.to_le_bytes());
        bytes[12..].copy_from_slice(&self.frame.to_le_bytes());
        bytes
    }

    /// From the wire. Any bytes are one.
    #[inline]
    pub fn from_bytes(bytes: &[u8; PACKED_GRANT_BYTES]) -> Self {
        let [checksum, last] = bytes.as_chunks::<8>().0 else { unreachable!("16 bytes are twice eight") };
        let [a, b, c, d, e, f, g, h] = *last;
        Self {
            checksum: u64::from_le_bytes(*checksum),
            fence: u32::from_le_bytes([a, b, c, d]),
            frame: u32::from_le_bytes([e, f, g, h]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The places are the contract: clients in other languages read them too.
    #[test]
    fn each_field_has_its_place() {
        let bytes: [u8; PACKED_GRANT_BYTES] = std::array::from_fn(|at| u8::try_from(at + 1).unwrap());
        let grant = PackedGrant::from_bytes(&bytes);
        assert_eq!(grant.checksum.to_le_bytes()[..], bytes[..8]);
        assert_eq!(grant.fence.to_le_bytes()[..], bytes[8..12]);
        assert_eq!(grant.frame.to_le_bytes()[..], bytes[12..]);
        assert_eq!(grant.to_bytes(), bytes);
    }
}
