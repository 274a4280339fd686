//! Rows of the table, in the form of the other benchmarks' lines: a value, what it
//! is compared with, the ratio, and the bar that the ratio must reach.

use std::fmt::Write;

/// One figure, or why there is none.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    unit: &'static str,
    result: Figure,
}

#[derive(Clone, Debug)]
enum Figure {
    Measured { value: f64, limit: Option<f64>, bar: Option<f64> },
    Skipped(String),
    Failed(String),
    Note(String),
}

/// What was measured, in order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    rows: Vec<Row>,
}

fn ratio(value: f64, limit: Option<f64>, unit: &str) -> Option<f64> {
    // Less time is better.
    limit.map(|limit| if unit == "us" { limit / value.max(f64::MIN_POSITIVE) } else { value / limit })
}

impl Rows {
    fn push(&mut self, name: &str, unit: &'static str, result: Figure) {
        let row = Row { name: name.to_owned(), unit, result };
        eprintln!("{}", row.line());
        self.rows.push(row);
    }

    /// A figure alone.
    pub(crate) fn plain(&mut self, name: &str, value: f64, unit: &'static str) {
        self.push(name, unit, Figure::Measured { value, limit: None, bar: None });
    }

    /// A figure beside a ceiling of the same run; `bar` is the part that it must reach.
    pub(crate) fn part_of(
        &mut self,
        name: &str,
        value: f64,
        limit: f64,
        bar: Option<f64>,
        unit: &'static str,
    ) {
        self.push(name, unit, Figure::Measured { value, limit: Some(limit), bar });
    }

    /// A figure that cannot be had here.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.push(name, "", Figure::Skipped(why.to_owned()));
    }

    /// A figure that should be there and is not.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        self.push(name, "", Figure::Failed(why.to_owned()));
    }

    /// Something to know about the others.
    pub(crate) fn note(&mut self, name: &str, text: &str) {
        self.push(name, "", Figure::Note(text.to_owned()));
    }

    /// Whether something is broken. A bar that is missed is not.
    pub(crate) fn failed(&self) -> bool {
        self.rows.iter().any(|row| matches!(row.result, Figure::Failed(_)))
    }

    /// The table, on standard output.
    pub(crate) fn print(&self) {
        println!(
            "{:<44} {:>10} {:<6} {:>10} {:>6} {:>5}",
            "FIGURE", "VALUE", "UNIT", "LIMIT", "RATIO", "BAR"
        );
        for row in &self.rows {
            println!("{}", row.line());
        }
        let count = |of: fn(&Row) -> bool| self.rows.iter().filter(|row| of(row)).count();
        println!(
            "{} figures, {} of them miss their bar; {} skipped, {} failed",
            count(|row| matches!(row.result, Figure::Measured { .. })),
            count(|row| row.is_ok() == Some(false)),
            count(|row| matches!(row.result, Figure::Skipped(_))),
            count(|row| matches!(row.result, Figure::Failed(_))),
        );
    }

    /// One line of JSON a row.
    pub(crate) fn json(&self) -> String {
        self.rows.iter().map(Row::json).collect()
    }
}

impl Row {
    fn is_ok(&self) -> Option<bool> {
        match self.result {
            Figure::Measured { value, limit, bar } => {
                let reached = ratio(value, limit, self.unit)?;
                bar.map(|bar| reached >= bar)
            }
            Figure::Skipped(_) | Figure::Failed(_) | Figure::Note(_) => None,
        }
    }

    fn line(&self) -> String {
        let Self { name, unit, result } = self;
        match result {
            Figure::Measured { value, limit, bar } => {
                let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
                let verdict = match self.is_ok() {
                    None => "",
                    Some(true) => "ok",
                    Some(false) => "MISSED",
                };
                let (limit_text, ratio) = (number(*limit), number(ratio(*value, *limit, unit)));
                let bar = number(*bar);
                format!("{name:<44} {value:>10.2} {unit:<6} {limit_text:>10} {ratio:>6} {bar:>5} {verdict}")
            }
            Figure::Skipped(why) => format!("{name:<44} skipped: {why}"),
            Figure::Failed(why) => format!("{name:<44} FAILED: {why}"),
            Figure::Note(text) => format!("{name:<44} {text}"),
        }
    }

    fn json(&self) -> String {
        let Self { name, unit, result } = self;
        let mut line = format!("{{\"name\":{}", quoted(name));
        match result {
            Figure::Measured { value, limit, bar } => {
                let number =
                    |value: Option<f64>| value.map_or("null".to_owned(), |value| format!("{value:.6}"));
                // Writing into text does not fail.
                let _ = write!(
                    line,
                    ",\"value\":{value:.6},\"unit\":{},\"limit\":{},\"ratio\":{},\"bar\":{},\"ok\":{}",
                    quoted(unit),
                    number(*limit),
                    number(ratio(*value, *limit, unit)),
                    number(*bar),
                    self.is_ok().unwrap_or(true),
                );
            }
            Figure::Skipped(why) => line += &format!(",\"skipped\":{}", quoted(why)),
            Figure::Failed(why) => line += &format!(",\"failed\":{}", quoted(why)),
            Figure::Note(text) => line += &format!(",\"note\":{}", quoted(text)),
        }
        line + "}\n"
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' => quoted += "\\\"",
            '\\' => quoted += "\\\\",
            control if control.is_control() => quoted += &format!("\\u{:04x}", u32::from(control)),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

/// The middle of some figures; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::{Rows, median};

    /// A missed bar could pass for reached, a time for a rate, or a reason break the JSON.
    #[test]
    fn rows_say_what_was_measured() {
        let mut rows = Rows::default();
        rows.part_of("rate", 40.0, 50.0, Some(0.95), "GB/s");
        rows.part_of("time", 100.0, 200.0, Some(1.0), "us");
        rows.skip("other", "no \"device\"\nhere");
        let json = rows.json();
        assert!(json.contains("\"ratio\":0.800000,\"bar\":0.950000,\"ok\":false"), "{json}");
        assert!(json.contains("\"ratio\":2.000000,\"bar\":1.000000,\"ok\":true"), "{json}");
        assert!(json.contains(r#""skipped":"no \"device\"\u000ahere""#), "{json}");
        assert_eq!(json.lines().count(), 3);
        assert!(!rows.failed());
        rows.fail("broken", "why");
        assert!(rows.failed());
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }
}
