//! Waiting until a daemon has done what it puts off: copies to its devices, room for windows, memory made ahead.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// How often it is looked at, and how often in a row nothing may be left: what ends may begin something else.
const PAUSE: Duration = Duration::from_millis(10);
const LOOKS: u32 = 3;
const TIME_MAX: Duration = Duration::from_secs(60);
/// All of them are 0 when nothing is left to do.
const LEFT: [&str; 4] =
    ["terrace_operations", "terrace_writes_waiting", "terrace_preparing", "terrace_lingering_bytes"];

/// Returns when the daemon with this metrics page has nothing left to do.
///
/// # Errors
/// When it does not answer, or does not come to an end.
pub(super) async fn settled(metrics: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut quiet = 0;
    while quiet < LOOKS {
        tokio::time::sleep(PAUSE).await;
        let page = reqwest::get(metrics).await?.error_for_status()?.text().await?;
        let left = LEFT.iter().map(|name| level(&page, name)).collect::<anyhow::Result<Vec<f64>>>()?;
        quiet = if left.iter().all(|left| *left == 0.0) { quiet + 1 } else { 0 };
        ensure!(began.elapsed() < TIME_MAX, "the daemon does not settle: {left:?} of {LEFT:?}");
    }
    Ok(())
}

fn level(page: &str, name: &str) -> anyhow::Result<f64> {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("no {name} on the metrics page"))?.trim().parse()?)
}
