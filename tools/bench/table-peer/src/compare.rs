//! Figures of both sides, by name; medians over the rounds.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// What of `terrace bench table` stands beside which figure of the peer.
const PAIRS: [(&str, &str); 5] = [
    ("table_register", "register"),
    ("table_replace", "replace"),
    ("table_lease_release", "match_release"),
    ("table_read_release", "match_release"),
    ("table_bytes_1m", "bytes"),
];

/// A line of either side, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
}

/// A line as `terrace bench -o json` prints it: the limit is the peer's figure of the same run.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    value: f64,
    unit: String,
    limit: f64,
    ratio: f64,
    bar: Option<f64>,
    ok: bool,
}

/// Prints a figure of the peer.
pub(crate) fn print(figure: &str, backend: &str, value: f64, unit: &str) -> anyhow::Result<()> {
    let name = format!("{figure}.{backend}");
    println!(
        "{}",
        serde_json::to_string(&serde_json::json!({ "name": name, "value": value, "unit": unit }))?
    );
    Ok(())
}

/// Prints ours against each backend of the peer. Both files hold the lines of all rounds.
pub(crate) fn run(ours: &str, peer: &str) -> anyhow::Result<()> {
    let (ours, peer) = (medians(ours)?, medians(peer)?);
    for (mine, theirs) in PAIRS {
        let (value, unit) =
            ours.get(mine).with_context(|| format!("`terrace bench table` printed no {mine}"))?;
        let prefix = format!("{theirs}.");
        for (name, (limit, _)) in peer.iter().filter(|(name, _)| name.starts_with(&prefix)) {
            let backend = name.strip_prefix(&prefix).unwrap_or_default();
            let line = Line {
                name: format!("{mine}_to_kvbm_{backend}"),
                value: *value,
                unit: unit.clone(),
                limit: *limit,
                ratio: limit / value,
                bar: None,
                ok: true,
            };
            println!("{}", serde_json::to_string(&line)?);
        }
    }
    Ok(())
}

/// The median of each figure of a file, with its unit.
fn medians(path: &str) -> anyhow::Result<BTreeMap<String, (f64, String)>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let mut values: BTreeMap<String, (Vec<f64>, String)> = BTreeMap::new();
    for line in text.lines() {
        let figure: Figure =
            serde_json::from_str(line).with_context(|| format!("{path}: no figure: {line}"))?;
        values.entry(figure.name).or_insert_with(|| (Vec::new(), figure.unit)).0.push(figure.value);
    }
    Ok(values.into_iter().map(|(name, (values, unit))| (name, (median(values), unit))).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rounds, or three, must give the middle and not the last.
    #[test]
    fn medians_are_medians() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }
}
