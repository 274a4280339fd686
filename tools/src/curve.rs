//! `tier curve`: what a tier would serve if it were smaller or larger.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use terrace_proto::v1::{self, CurveRequest, Tier};

use crate::admin::tier_name;
use crate::chart::{self, Corner, Plot, Series};
use crate::cli::Target;
use crate::connect::{admin, refused};
use crate::output::{self, Format};

/// Bytes of a GiB, for the axis of a plot.
const GIB: f64 = 1_073_741_824.0;

/// Which curves.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// One tier [default: every tier that has a curve]
    #[arg(long, value_enum)]
    tier: Option<TierChoice>,
    /// One tenant [default: all of them together]
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Plot the curves into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A tier that has curves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TierChoice {
    /// Host memory
    Pinned,
    /// Devices
    Nvme,
}

pub(crate) async fn run(target: &Target, format: Format, options: &Options) -> anyhow::Result<ExitCode> {
    let tier = match options.tier {
        None => Tier::Unspecified,
        Some(TierChoice::Pinned) => Tier::Pinned,
        Some(TierChoice::Nvme) => Tier::Nvme,
    };
    let request = CurveRequest { tier: tier.into(), tenant: options.tenant.clone().unwrap_or_default() };
    let answer = admin(target).await?.curve(request).await.map_err(refused)?.into_inner();
    if let Some(path) = &options.svg {
        if answer.curves.iter().all(|curve| !is_known(curve)) {
            bail!("nothing to plot: {}", nothing(options));
        }
        let drawing = chart::draw(&plots(&answer.curves))?;
        std::fs::write(path, drawing).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match format {
        Format::Json => output::json(&Value::Array(answer.curves.iter().map(curve_json).collect()))?,
        Format::Table if answer.curves.is_empty() => println!("{}", nothing(options)),
        Format::Table => answer.curves.iter().for_each(print),
    }
    Ok(ExitCode::SUCCESS)
}

/// Why there is no curve.
fn nothing(options: &Options) -> String {
    let whose = options.tenant.as_ref().map_or_else(String::new, |tenant| format!(" for tenant `{tenant}`"));
    format!("the daemon has estimated no curve{whose} yet: it needs some traffic first")
}

/// Without a block that was asked for, every point would be a hit ratio of nothing.
fn is_known(curve: &v1::TierCurve) -> bool {
    curve.references > 0 && !curve.points.is_empty()
}

fn title(curve: &v1::TierCurve) -> String {
    let now = format!("{}, {} now", tier_name(curve.tier()), output::bytes(curve.capacity_bytes));
    if curve.references == 0 {
        return format!("{now}; no block was asked for yet, so there is no curve");
    }
    let sampled = curve.sample_rate * 100.0;
    format!("{now}; from {} blocks asked for, {sampled:.2} % of them sampled", curve.references)
}

fn print(curve: &v1::TierCurve) {
    println!("{}", title(curve));
    if !is_known(curve) {
        return;
    }
    let mut table = output::table(&[">SIZE", ">TOKENS", ">SECONDS", ">SAVED SO FAR", "", ""]);
    let here = nearest(curve);
    for (place, point) in curve.points.iter().enumerate() {
        table.add_row([
            output::bytes(point.capacity_bytes),
            format!("{:.1} %", point.token_hit_ratio * 100.0),
            format!("{:.1} %", point.saved_seconds_ratio * 100.0),
            format!("{:.0} s", point.saved_seconds),
            meter(point.token_hit_ratio),
            if here == Some(place) { "now" } else { "" }.to_owned(),
        ]);
    }
    output::print(&table);
}

/// The point next to the tier's size.
fn nearest(curve: &v1::TierCurve) -> Option<usize> {
    let distance = |point: &v1::CurvePoint| point.capacity_bytes.abs_diff(curve.capacity_bytes);
    let nearest = curve.points.iter().enumerate().min_by_key(|(_, point)| distance(point));
    nearest.map(|(place, _)| place)
}

/// A share as ten characters.
fn meter(share: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a thousand, held within its bounds"
    )]
    let thousandths = (share.clamp(0.0, 1.0) * 1000.0) as u64;
    output::bar(thousandths, 1000)
}

fn curve_json(curve: &v1::TierCurve) -> Value {
    let points = curve.points.iter().map(|point| {
        json!({
            "capacity_bytes": point.capacity_bytes,
            "token_hit_ratio": point.token_hit_ratio,
            "saved_seconds_ratio": point.saved_seconds_ratio,
            "saved_seconds": point.saved_seconds,
        })
    });
    json!({
        "tier": tier_name(curve.tier()),
        "tenant": curve.tenant,
        "capacity_bytes": curve.capacity_bytes,
        "sample_rate": curve.sample_rate,
        "references": curve.references,
        "points": points.collect::<Vec<_>>(),
    })
}

/// One plot a tier, with hits in tokens and in seconds, and the tier's size.
fn plots(curves: &[v1::TierCurve]) -> Vec<Plot> {
    #[expect(clippy::cast_precision_loss, reason = "a position on an axis")]
    let gib = |bytes: u64| bytes as f64 / GIB;
    let drawn = curves.iter().filter(|curve| is_known(curve));
    drawn
        .map(|curve| {
            let line = |name: &str, value: fn(&v1::CurvePoint) -> f64| Series {
                name: name.to_owned(),
                points: curve.points.iter().map(|at| (gib(at.capacity_bytes), value(at) * 100.0)).collect(),
            };
            let top = curve.points.iter().map(|at| at.token_hit_ratio.max(at.saved_seconds_ratio));
            let top = top.fold(0.0, f64::max) * 100.0;
            let now = gib(curve.capacity_bytes);
            let size = Series { name: "size now".to_owned(), points: vec![(now, 0.0), (now, top)] };
            let tenant = if curve.tenant.is_empty() {
                "all tenants".to_owned()
            } else {
                format!("tenant {}", curve.tenant)
            };
            Plot {
                title: format!("{}, {tenant}", tier_name(curve.tier())),
                x: "size of the tier, GiB",
                y: "% served",
                series: vec![
                    line("prompt tokens", |at| at.token_hit_ratio),
                    line("prefill seconds", |at| at.saved_seconds_ratio),
                    size,
                ],
                legend: Corner::LowerRight,
                marked: false,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> v1::TierCurve {
        let point = |gib: u64, ratio: f64| v1::CurvePoint {
            capacity_bytes: gib << 30,
            token_hit_ratio: ratio,
            saved_seconds_ratio: ratio / 2.0,
            saved_seconds: ratio * 100.0,
        };
        v1::TierCurve {
            tier: Tier::Nvme.into(),
            tenant: String::new(),
            capacity_bytes: 90 << 30,
            sample_rate: 0.25,
            references: 1000,
            points: vec![point(10, 0.1), point(100, 0.5), point(1000, 0.75)],
        }
    }

    /// The reader looks for today's size first: the wrong mark would be read as today's hits.
    #[test]
    fn the_point_of_today_is_marked() {
        assert_eq!(nearest(&curve()), Some(1));
        assert_eq!(nearest(&v1::TierCurve { points: vec![], ..curve() }), None);
        assert_eq!((meter(0.5), meter(2.0)), ("#####.....".to_owned(), "##########".to_owned()));
    }

    /// Rows of 0.0 % before the first request would be read as a tier that is of no use.
    #[test]
    fn no_curve_before_the_first_block_is_asked_for() {
        let unasked = v1::TierCurve { references: 0, ..curve() };
        assert!(!is_known(&unasked) && is_known(&curve()));
        assert_eq!(title(&unasked), "Nvme, 90.0 GiB now; no block was asked for yet, so there is no curve");
        assert!(title(&curve()).ends_with("from 1000 blocks asked for, 25.00 % of them sampled"));
        assert!(plots(&[unasked]).is_empty());
    }

    /// A line that is left out of the plot, or percent that are shares, would mislead.
    #[test]
    fn a_curve_is_plotted_with_both_its_lines() {
        let plots = plots(&[curve(), v1::TierCurve { points: vec![], ..curve() }]);
        assert_eq!(plots.len(), 1, "a curve without points is no plot");
        assert_eq!(plots[0].series[0].points[1], (100.0, 50.0));
        assert_eq!(plots[0].series[1].points[1], (100.0, 25.0));
        assert_eq!(plots[0].series[2].points, [(90.0, 0.0), (90.0, 75.0)]);
        assert!(chart::draw(&plots).unwrap().contains("all tenants"));
        assert_eq!(curve_json(&curve())["points"][2]["capacity_bytes"], 1_073_741_824_000_u64);
    }
}
