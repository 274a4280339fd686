//! The two streams to the daemon: what the workers report, and what this router
//! reports. Both come back by themselves when the daemon was away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_client::signals::{Follower, Report, Reporter};

use crate::serve::Router;

/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// Keeps the fleet up to date. Never ends; may be dropped at any time.
pub async fn follow(router: Arc<Router>) {
    let follower = Follower::start(router.config.grpc.clone());
    let mut reports = follower.reports();
    loop {
        let seen = reports.borrow_and_update().clone();
        // Without a daemon there are no reports; what was known stays.
        if seen.incarnation != 0 {
            let reader = Arc::clone(&router);
            let workers = seen.workers.clone();
            let read = tokio::task::spawn_blocking(move || reader.models.read(&workers)).await;
            if let Err(error) = read {
                tracing::error!(%error, "reading a model's header failed");
            }
            router.fleet.observe(&seen, Instant::now());
        }
        if reports.changed().await.is_err() {
            return;
        }
    }
}

/// Reports prefill pressure. Never ends; may be dropped at any time.
pub async fn report(router: Arc<Router>) {
    let pressure = || Report::Pressure(router.pressure.report(&router.config.name, Instant::now()));
    let reporter = Reporter::start(router.config.grpc.clone(), pressure());
    loop {
        tokio::time::sleep(REPORT_EVERY).await;
        reporter.report(pressure());
    }
}
