//! Numbers that nobody chose: for ids, seeds and draws between equals. Not for
//! secrets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// 64 bits, never the same twice in one process.
pub(crate) fn bits() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = clock.map_or(0, |since| u64::from(since.subsec_nanos()) ^ (since.as_secs() << 30));
    let mut bits =
        nanos.wrapping_add(count.wrapping_mul(STEP)).wrapping_add(u64::from(std::process::id()) << 32);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// A number in 0..1.
pub(crate) fn share() -> f64 {
    let high = u32::try_from(bits() >> 32).unwrap_or(u32::MAX);
    f64::from(high) / (f64::from(u32::MAX) + 1.0)
}
