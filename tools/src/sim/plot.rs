//! Plots of replays: hit ratio by size of a tier, and times to first token.

use anyhow::bail;

use super::report::{Run, policy_name};
use crate::chart::{Corner, Plot, Series, draw};

/// Points of a distribution that are drawn.
const POINTS: usize = 200;

/// The plots of some replays: for each trace hit ratio by size when there are
/// several sizes, and the times to first token when the model has them.
///
/// # Errors
/// When the replays leave nothing to plot.
pub(crate) fn runs(runs: &[Run]) -> anyhow::Result<String> {
    let mut plots = Vec::new();
    let mut traces: Vec<&str> = runs.iter().map(|run| run.trace.as_str()).collect();
    traces.dedup();
    for trace in traces {
        let of_trace: Vec<&Run> = runs.iter().filter(|run| run.trace == trace).collect();
        plots.extend(hits(trace, &of_trace));
        plots.extend(first_tokens(trace, &of_trace));
    }
    if plots.is_empty() {
        bail!("nothing to plot: one replay of the reference model is a single point; add --sweep");
    }
    draw(&plots)
}

fn hits(trace: &str, runs: &[&Run]) -> Option<Plot> {
    let differs = |value: fn(&Run) -> u64| runs.iter().any(|run| value(run) != value(runs[0]));
    let (size, x): (fn(&Run) -> f64, _) = if differs(|run| run.pinned_frames) {
        (Run::pinned_share, "Pinned, % of distinct blocks")
    } else if differs(|run| run.nvme_frames) {
        (Run::nvme_share, "Nvme, % of distinct blocks")
    } else {
        return None;
    };
    let mut series: Vec<Series> = Vec::new();
    for run in runs {
        let name = policy_name(run.policy);
        let point = (size(run) * 100.0, run.outcome.token_ratio() * 100.0);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name: name.to_owned(), points: vec![point] }),
        }
    }
    for line in &mut series {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let legend = Corner::LowerRight;
    Some(Plot { title: format!("{trace}: hits"), x, y: "% of prompt tokens", series, legend, marked: true })
}

fn first_tokens(trace: &str, runs: &[&Run]) -> Option<Plot> {
    let series: Vec<Series> = runs
        .iter()
        .filter(|run| !run.outcome.first_tokens.is_empty())
        .map(|run| {
            let shares = (0..=POINTS).map(|point| super::report::ratio(point as u64, POINTS as u64));
            let points = shares.filter_map(|share| Some((run.outcome.first_token_at(share)?, share * 100.0)));
            let name = format!("{} {} + {}", policy_name(run.policy), run.pinned_name, run.nvme_name);
            Series { name, points: points.collect() }
        })
        .collect();
    let title = format!("{trace}: time to first token");
    let legend = Corner::UpperLeft;
    (!series.is_empty()).then_some(Plot {
        title,
        x: "seconds",
        y: "% of requests",
        series,
        legend,
        marked: false,
    })
}
