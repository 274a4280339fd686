//! The streams of signals: what the workers report to each daemon, and what this
//! router reports to the first. They come back by themselves when a daemon was away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::select_all;
use terrace_client::signals::{Follower, Report, Reporter};
use terrace_proto::v1::ObserveResponse;

use crate::serve::Router;

/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// Keeps the fleet up to date. Never ends; may be dropped at any time.
pub async fn follow(router: Arc<Router>) {
    let followers: Vec<_> = router.config.grpc.iter().map(|grpc| Follower::start(grpc.clone())).collect();
    let mut reports: Vec<_> = followers.iter().map(Follower::reports).collect();
    let mut known = vec![ObserveResponse::default(); reports.len()];
    loop {
        for (known, report) in known.iter_mut().zip(&mut reports) {
            // Without a daemon there are no reports; what was known stays.
            let report = report.borrow_and_update();
            if report.incarnation != 0 {
                known.clone_from(&report);
            }
        }
        let seen = router.homes.join(&known, &router.config.grpc);
        if seen.incarnation != 0 {
            let reader = Arc::clone(&router);
            let workers = seen.workers.clone();
            let read = tokio::task::spawn_blocking(move || reader.models.read(&workers)).await;
            if let Err(error) = read {
                tracing::error!(%error, "reading a model's header failed");
            }
            router.fleet.observe(&seen, Instant::now());
        }
        let (changed, _, _) = select_all(reports.iter_mut().map(|report| Box::pin(report.changed()))).await;
        if changed.is_err() {
            return;
        }
    }
}

/// Reports prefill pressure. Never ends; may be dropped at any time.
pub async fn report(router: Arc<Router>) {
    let pressure = || Report::Pressure(router.pressure.report(&router.config.name, Instant::now()));
    let reporter = Reporter::start(router.config.grpc[0].clone(), pressure());
    loop {
        tokio::time::sleep(REPORT_EVERY).await;
        reporter.report(pressure());
    }
}
