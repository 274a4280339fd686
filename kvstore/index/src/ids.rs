//! Keys, holders, tiers and limits.

/// Most holders of one index. A record keeps the holder in 20 bits.
pub const HOLDERS_MAX: u32 = (1 << 20) - 1;
/// Smallest memory an index works with: a segment of everything, and room to change.
pub(crate) const BYTES_MIN: u64 = 1 << 20;

/// Identity of a block and of all blocks before it: 128 bits of the chained block id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

impl Key {
    /// A chain key or block id.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        // Both halves fit by construction; shifting instead of casting keeps that visible.
        Self { low: low_half(bits), high: low_half(bits >> 64) }
    }

    /// The bytes it was made of.
    pub const fn to_bytes(self) -> [u8; 16] {
        ((self.high as u128) << 64 | self.low as u128).to_le_bytes()
    }

    /// An engine's 64-bit hash of a block, where nothing longer is known. Its own key space: it never
    /// equals a key of [`Key::from_bytes`] but by a chance of 2^-64.
    pub const fn from_alias(alias: u64) -> Self {
        Self { low: mix(alias), high: mix(alias ^ 0x6a09_e667_f3bc_c908) }
    }

    /// 32 bits for the directory. Good also for keys that differ in few bits.
    pub(crate) const fn hash(self) -> u32 {
        let folded = self.low ^ self.high.rotate_left(29);
        let wide = folded.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((wide ^ (wide >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low_half(bits: u128) -> u64 {
    bits as u64
}

/// SplitMix64, one to one.
const fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Somebody who holds blocks: an engine, a daemon, a shared pool. Numbers should be small and dense: a
/// reader's scratch grows with the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HolderId(pub u32);

/// Where a holder has a block, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Device memory.
    Hbm,
    /// Host memory.
    Pinned,
    /// Disk, and whatever else is slower than host memory.
    Nvme,
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Self; 3] = [Self::Hbm, Self::Pinned, Self::Nvme];

    /// 0 for the fastest.
    pub const fn index(self) -> usize {
        match self {
            Self::Hbm => 0,
            Self::Pinned => 1,
            Self::Nvme => 2,
        }
    }
}

/// Tiers as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TierSet(u8);

impl TierSet {
    /// No tier.
    pub const NONE: Self = Self(0);
    /// Device memory.
    pub const HBM: Self = Self(1);
    /// Host memory.
    pub const PINNED: Self = Self(2);
    /// Disk.
    pub const NVME: Self = Self(4);
    /// Every tier.
    pub const ALL: Self = Self(7);

    /// The set of one tier.
    pub const fn of(tier: Tier) -> Self {
        match tier {
            Tier::Hbm => Self::HBM,
            Tier::Pinned => Self::PINNED,
            Tier::Nvme => Self::NVME,
        }
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether `tier` is in it.
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & Self::of(tier).0 != 0
    }

    /// Whether it holds no tier.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Bit 0 is `Hbm`, bit 1 `Pinned`, bit 2 `Nvme`.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The reverse of [`TierSet::bits`]; none if another bit is set.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        if bits <= Self::ALL.0 { Some(Self(bits)) } else { None }
    }
}

/// Bytes of a block as a power of two, rounded up. 0 means unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SizeClass(u8);

impl SizeClass {
    /// Nobody said.
    pub const UNKNOWN: Self = Self(0);
    /// Largest class.
    const MAX: u8 = 63;

    /// The class of a block of so many bytes.
    pub const fn of_bytes(bytes: u64) -> Self {
        if bytes == 0 {
            return Self::UNKNOWN;
        }
        let mut class = 0;
        while class < Self::MAX && 1u64 << class < bytes {
            class += 1;
        }
        Self(if class == 0 { 1 } else { class })
    }

    /// At most so many bytes; 0 if unknown.
    pub const fn bytes_max(self) -> u64 {
        if self.0 == 0 { 0 } else { 1u64 << self.0 }
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0 as u64
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(u8::try_from(bits).unwrap_or(Self::MAX).min(Self::MAX))
    }
}

/// What an index may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Holders are numbered below this; at most [`HOLDERS_MAX`].
    pub holders: u32,
    /// Memory of the index; at least 1 MiB. What is coldest is forgotten at it.
    pub bytes: u64,
}

/// Why a change was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The holder's number is not below [`Limits::holders`].
    #[error("holder {holder} is out of range; holders are numbered below {limit}")]
    Holder {
        /// The number.
        holder: u32,
        /// The limit.
        limit: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes could be swapped between the halves, or a class be too small for its bytes.
    #[test]
    fn keys_and_classes_come_back() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        assert_eq!(Key::from_bytes(bytes).to_bytes(), bytes);
        assert_ne!(Key::from_alias(7), Key::from_alias(8));
        for bytes in [1, 2, 3, 4096, 4097, 1 << 40] {
            let class = SizeClass::of_bytes(bytes);
            assert!(class.bytes_max() >= bytes, "{bytes}");
            assert!(class.bytes_max() < 2 * bytes.max(2), "{bytes}");
        }
        assert_eq!(SizeClass::of_bytes(0).bytes_max(), 0);
        assert_eq!(TierSet::from_bits(8), None);
        assert!(TierSet::HBM.with(TierSet::NVME).has(Tier::Nvme));
    }
}
