//! Sizes of tiers as people write them: bytes with a unit, or a share of the
//! distinct blocks of a trace.

use std::fmt;
use std::str::FromStr;

/// Units, largest suffix first where one ends with another.
const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// How large a tier is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Size {
    /// As bytes.
    Bytes(u64),
    /// As a share of the trace's distinct blocks, 0 to 1.
    Share(f64),
}

impl Size {
    /// Frames of `frame_bytes` that fit, or the share of `distinct` blocks, to the nearest.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of at most 2^32 blocks, checked when it was read to be 0 to 1"
    )]
    pub(crate) fn frames(self, frame_bytes: u64, distinct: u64) -> u64 {
        match self {
            Size::Bytes(bytes) => bytes / frame_bytes.max(1),
            Size::Share(share) => (share * distinct as f64).round() as u64,
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Size::Bytes(bytes) => f.write_str(&crate::output::bytes(*bytes)),
            Size::Share(share) => write!(f, "{} %", round(share * 100.0)),
        }
    }
}

/// Without the noise of binary fractions.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no size: write bytes with a unit (64GiB, 1.5TB) or a share (3%)");
        let trimmed = text.trim();
        if let Some(number) = trimmed.strip_suffix('%') {
            let percent: f64 = number.trim().parse().map_err(|_| wrong())?;
            if !(0.0..=100.0).contains(&percent) {
                return Err(format!("`{text}` is no share of the distinct blocks: allowed are 0% to 100%"));
            }
            return Ok(Size::Share(percent / 100.0));
        }
        let (number, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| Some((trimmed.strip_suffix(suffix)?.trim_end(), *unit)))
            .unwrap_or((trimmed, 1));
        scaled(number, unit).map(Size::Bytes).ok_or_else(wrong)
    }
}

/// A decimal number times a unit, in whole bytes. `None` if it is none, or too large.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit);
    }
    let (whole, fraction) = number.split_once('.')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if fraction.is_empty() || fraction.len() > 9 || !digits(whole) || !digits(fraction) {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let digits = whole.checked_mul(scale)?.checked_add(fraction.parse().ok()?)?;
    u64::try_from(digits.checked_mul(u128::from(unit))? / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A size that is misread by a unit would size a node a thousand times too small.
    #[test]
    fn sizes_are_read_as_people_write_them() {
        let read = |text: &str| text.parse::<Size>();
        assert_eq!(read("64GiB"), Ok(Size::Bytes(64 << 30)));
        assert_eq!(read("1.5 TB"), Ok(Size::Bytes(1_500_000_000_000)));
        assert_eq!(read("0"), Ok(Size::Bytes(0)));
        assert_eq!(read("0.3%"), Ok(Size::Share(0.003)));
        for text in ["", "%", "-1%", "101%", "NaN%", "1.5.2GB", "12 parsecs", "-3GiB", "99999999999TiB", "1."]
        {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(Size::Share(0.003).to_string(), "0.3 %");
    }

    /// A share is of the distinct blocks, bytes are of whole frames.
    #[test]
    fn sizes_become_frames() {
        assert_eq!(Size::Share(0.01).frames(1, 182_790), 1828);
        assert_eq!(Size::Bytes(1000).frames(300, 0), 3);
    }
}
