//! Quantities that must never be mixed up.

/// Bytes in one kibibyte.
pub const KIB: u64 = 1 << 10;
/// Bytes in one mebibyte.
pub const MIB: u64 = 1 << 20;
/// Bytes in one gibibyte.
pub const GIB: u64 = 1 << 30;

/// A length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(u64);

/// A number of whole KV blocks. Not an index: the last block of `n` is `n - 1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(u32);

/// A number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenCount(u32);

/// A point on the caller's monotonic clock, in microseconds. The core never
/// reads a clock; it is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Now(u64);

/// A span of time in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Micros(u64);

impl ByteCount {
    /// Wraps a raw length.
    #[inline]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The raw length, for syscalls, wire fields and metrics only.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The smallest multiple of `unit` that holds this many bytes; `None` if it overflows.
    pub fn round_up(self, unit: u64) -> Option<Self> {
        self.0.checked_next_multiple_of(unit).map(Self)
    }
}

impl BlockCount {
    /// Wraps a raw count.
    #[inline]
    pub const fn new(blocks: u32) -> Self {
        Self(blocks)
    }

    /// The raw count.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Bytes needed to hold this many blocks. `None` if that overflows.
    pub fn bytes(self, block: ByteCount) -> Option<ByteCount> {
        u64::from(self.0).checked_mul(block.0).map(ByteCount)
    }
}

impl TokenCount {
    /// Wraps a raw count.
    #[inline]
    pub const fn new(tokens: u32) -> Self {
        Self(tokens)
    }

    /// The raw count.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Now {
    /// Wraps microseconds since the caller's origin.
    #[inline]
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since the caller's origin.
    #[inline]
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// This point moved forward; stops at the end of time.
    #[inline]
    pub const fn after(self, span: Micros) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// Time passed since `earlier`; zero if that is later than `self`.
    #[inline]
    pub const fn since(self, earlier: Now) -> Micros {
        Micros(self.0.saturating_sub(earlier.0))
    }
}

impl Micros {
    /// Wraps microseconds.
    #[inline]
    pub const fn new(micros: u64) -> Self {
        Self(micros)
    }

    /// From milliseconds; saturates.
    #[inline]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1000))
    }

    /// The raw count.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whole milliseconds, rounded down.
    #[inline]
    pub const fn millis(self) -> u64 {
        self.0 / 1000
    }
}
