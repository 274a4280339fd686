//! How results are printed: tables that fit 80 columns, or JSON.

use clap::ValueEnum;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

/// Columns of a table when the terminal does not say.
const COLUMNS: u16 = 80;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Prints `value` as JSON.
///
/// # Errors
/// Never in practice: the values are plain.
pub(crate) fn json(value: &Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A table with these headings; columns whose heading begins with `>` are
/// aligned to the right.
pub(crate) fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if table.width().is_none() {
        table.set_width(COLUMNS);
    }
    table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for (index, heading) in headings.iter().enumerate() {
        if heading.starts_with('>')
            && let Some(column) = table.column_mut(index)
        {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints a table without trailing blanks.
pub(crate) fn print(table: &Table) {
    for line in table.lines() {
        println!("{}", line.trim_end());
    }
}

/// A length in the largest binary unit that leaves at least 1.
pub(crate) fn bytes(length: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if length < 1024 {
        return format!("{length} B");
    }
    let mut unit = 0;
    let mut tenths = u128::from(length) * 10 / 1024;
    while tenths >= 10 * 1024 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A span of milliseconds in its two largest units.
pub(crate) fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, 0) => format!("{ms} ms"),
        (0, 0, 0, s) => format!("{s}.{} s", ms % 1000 / 100),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

/// A share as ten characters.
pub(crate) fn bar(part: u64, whole: u64) -> String {
    let tenths = if whole == 0 { 0 } else { (u128::from(part) * 10).div_ceil(u128::from(whole)).min(10) };
    (0..10).map(|tenth| if tenth < tenths { '#' } else { '.' }).collect()
}

/// Bytes as hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Off-by-one in units would mislead operators by a factor of 1,024.
    #[test]
    fn lengths_and_times_read_well() {
        let lengths = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, 98_362_432, 1 << 40, u64::MAX];
        let texts = lengths.map(bytes);
        let expected = [
            "0 B",
            "1023 B",
            "1.0 KiB",
            "1.5 KiB",
            "1023.9 KiB",
            "1.0 MiB",
            "93.8 MiB",
            "1.0 TiB",
            "16384.0 PiB",
        ];
        assert_eq!(texts[..8], expected[..8]);
        assert!(texts[8].ends_with("PiB"));
        assert_eq!(
            [12, 1_200, 61_000, 3_660_000, 90_000_000].map(duration),
            ["12 ms", "1.2 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
        );
    }

    /// A nearly empty tier must not look empty, and no tier may overflow its bar.
    #[test]
    fn bars_show_a_trace_and_never_overflow() {
        assert_eq!(bar(0, 100), "..........");
        assert_eq!(bar(1, 1_000_000), "#.........");
        assert_eq!(bar(100, 100), "##########");
        assert_eq!(bar(u64::MAX, 1), "##########");
        assert_eq!(bar(1, 0), "..........");
    }
}
