//! Identities. Each names one thing for its whole life and is never reused in
//! one incarnation.

use std::fmt;

macro_rules! hash_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// From its 16 bytes, little-endian.
            #[inline]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(u128::from_le_bytes(bytes))
            }

            /// Its 16 bytes, little-endian: the form on disk and on the wire.
            #[inline]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.to_le_bytes()
            }

            /// The number itself, for hashing into tables: its bits are uniform.
            #[inline]
            pub const fn as_u128(self) -> u128 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        /// 32 hexadecimal digits, in the order of the bytes.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.to_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::str::FromStr for $name {
            type Err = BadId;

            fn from_str(text: &str) -> Result<Self, BadId> {
                let digits = text.as_bytes();
                if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
                    return Err(BadId { found: text.chars().take(40).collect() });
                }
                let mut bytes = [0u8; 16];
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16)
                        .map_err(|_| BadId { found: text.to_owned() })?;
                }
                Ok(Self::from_bytes(bytes))
            }
        }
    };
}

macro_rules! counter_id {
    ($(#[$doc:meta])* $name:ident, $raw:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($raw);

        impl $name {
            /// Wraps the raw number.
            #[inline]
            pub const fn new(raw: $raw) -> Self {
                Self(raw)
            }

            /// The raw number, for wire fields and metrics only.
            #[inline]
            pub const fn get(self) -> $raw {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// Like [`counter_id`], for ids that tables hold by the million: counted from
/// one, so that an absent one takes no room. Numbers that cannot be are all
/// taken for the last one, which is never given out.
macro_rules! dense_id {
    ($(#[$doc:meta])* $name:ident, $raw:ty, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($inner);

        impl $name {
            /// Stands for every number that is never given out.
            pub const NOBODY: Self = Self(<$inner>::MAX);

            /// From a raw number of the wire or a counter.
            #[allow(clippy::cast_possible_truncation, reason = "numbers that do not fit were told apart before")]
            #[inline]
            pub const fn new(raw: u64) -> Self {
                if raw > <$raw>::MAX as u64 {
                    return Self::NOBODY;
                }
                match <$inner>::new(raw as $raw) {
                    Some(inner) => Self(inner),
                    None => Self::NOBODY,
                }
            }

            /// The raw number, for wire fields and metrics only.
            #[allow(clippy::useless_conversion, reason = "the conversion is the identity for 64 bits")]
            pub fn get(self) -> u64 {
                u64::from(self.0.get())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

/// Text that is no 128-bit id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is no id: expected 32 hexadecimal digits")]
pub struct BadId {
    /// The text, cut to 40 characters.
    pub found: String,
}

hash_id! {
    /// Everything that makes KV bytes interchangeable; see [`crate::SpaceManifest`].
    SpaceId
}
hash_id! {
    /// One block: its space, its tokens and all tokens before it, under its tenant's key.
    BlockId
}
hash_id! {
    /// A tenant, by the hash of its name.
    TenantId
}

hash_id! {
    /// What a client calls itself on each of its connections, one after the other: random, and a secret.
    ClientId
}

dense_id! {
    /// One connection of one client process.
    SessionId, u64, std::num::NonZeroU64
}
dense_id! {
    /// A region of one tier, carved into equal frames.
    ChunkId, u32, std::num::NonZeroU32
}
counter_id! {
    /// A session's right to read or fill blocks until a deadline.
    LeaseId, u64
}
counter_id! {
    /// A file or raw device of the Nvme tier, in the order of the configuration.
    DeviceId, u16
}
counter_id! {
    /// A device of the Hbm tier, in the order of the configuration; below [`GPUS_MAX`].
    GpuId, u16
}
counter_id! {
    /// One I/O or memory operation that the shell performs for the core.
    OpId, u64
}
counter_id! {
    /// One request of a session, as the shell numbers them.
    RequestId, u64
}

/// Bumped each time a frame changes what it holds. A reader that presents an
/// older fence was granted a block that is no longer there, and is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(u64);

impl Fence {
    /// Wraps the raw number.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw number, for the fence page and the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The fence after this one. 2^64 bumps do not happen.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Most devices of the Hbm tier.
pub const GPUS_MAX: u16 = 16;

/// Memory in which a block can be read in place: a tier and, of Hbm, the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Memory {
    /// Of the host.
    #[default]
    Pinned,
    /// Of a device.
    Hbm(GpuId),
}

/// Some devices of the Hbm tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuSet(u16);

impl GpuSet {
    /// None of them.
    pub const NONE: Self = Self(0);

    const fn bit(gpu: GpuId) -> u16 {
        1 << (gpu.0 % GPUS_MAX)
    }

    /// Whether a device is one of them.
    pub const fn contains(self, gpu: GpuId) -> bool {
        self.0 & Self::bit(gpu) != 0
    }

    /// These and one more.
    #[must_use]
    pub const fn with(self, gpu: GpuId) -> Self {
        Self(self.0 | Self::bit(gpu))
    }

    /// These but one.
    #[must_use]
    pub const fn without(self, gpu: GpuId) -> Self {
        Self(self.0 & !Self::bit(gpu))
    }

    /// Those that are in both.
    #[must_use]
    pub const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether there is none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Each of them, lowest number first.
    pub fn iter(self) -> impl Iterator<Item = GpuId> {
        (0..GPUS_MAX).map(GpuId::new).filter(move |&gpu| self.contains(gpu))
    }
}

/// A frame of a chunk in Pinned or Hbm: the chunk says in which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameRef {
    /// The chunk.
    pub chunk: ChunkId,
    /// Index of the frame in the chunk, and of its fence in the chunk's fence page.
    pub index: u32,
}

/// A frame on a device of the Nvme tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskFrame {
    /// The device.
    pub device: DeviceId,
    /// Index of the chunk slot on the device.
    pub slot: u32,
    /// Index of the frame in the slot.
    pub index: u32,
}
