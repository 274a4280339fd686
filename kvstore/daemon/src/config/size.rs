//! Lengths as people write them: `64MiB`, `4GiB`, or plain bytes.

use terrace_core::{ByteCount, GIB, KIB, MIB};

/// Reads a length.
///
/// # Errors
/// A sentence that says what is allowed.
pub(crate) fn parse(text: &str) -> Result<ByteCount, String> {
    let allowed =
        || format!("`{text}` is no length; write bytes, or a number with KiB, MiB, GiB or TiB, as `64MiB`");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic()).trim_end();
    let unit = match text[digits.len()..].trim() {
        "" | "B" => 1,
        "KiB" => KIB,
        "MiB" => MIB,
        "GiB" => GIB,
        "TiB" => GIB << 10,
        _ => return Err(allowed()),
    };
    let number: u64 = digits.parse().map_err(|_| allowed())?;
    number.checked_mul(unit).map(ByteCount::new).ok_or_else(allowed)
}

/// The shortest exact text of a length.
pub(crate) fn show(bytes: ByteCount) -> String {
    let bytes = bytes.get();
    for (unit, name) in [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{name}", bytes / unit);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A length could be read as another one, or overflow: try every unit, nonsense, and the end of u64.
    #[test]
    fn lengths_are_read_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64MiB", 64 << 20),
            ("1 GiB", 1 << 30),
            ("2TiB", 2 << 40),
            ("3KiB", 3072),
        ] {
            assert_eq!(parse(text), Ok(ByteCount::new(bytes)), "{text}");
        }
        for text in ["", "MiB", "64mb", "64MB", "-1", "1.5GiB", "99999999999TiB", "64 M iB"] {
            assert!(parse(text).unwrap_err().contains("64MiB"), "{text}");
        }
        assert_eq!(show(ByteCount::new(64 << 20)), "64MiB");
        assert_eq!(show(ByteCount::new(4097)), "4097");
    }
}
