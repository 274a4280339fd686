//! Tells the daemon what this worker is and how busy, so that routers find it.

use std::sync::Arc;
use std::time::Duration;

use terrace_client::manifest_to_wire;
use terrace_client::signals::{Report, Reporter};
use terrace_core::SpaceManifest;
use terrace_proto::v1::{WorkerLoad, WorkerRole};

use crate::service::args::WorkerArgs;
use crate::service::load::Load;
use crate::service::rpc::Bounds;

/// Rates change without an event, so they are told now and then.
const REPORT_PERIOD: Duration = Duration::from_millis(500);
/// Changes closer together than this are told as one.
const REPORT_GAP: Duration = Duration::from_millis(20);

/// What does not change while the worker lives.
pub(crate) struct Description {
    pub(crate) role: WorkerRole,
    pub(crate) endpoint: String,
    pub(crate) manifest: SpaceManifest,
    pub(crate) bounds: Bounds,
    pub(crate) model_path: String,
}

/// Reports until it is aborted. Without an address there is nobody to tell.
pub(crate) async fn run(args: WorkerArgs, description: Description, load: Arc<Load>) {
    let Some(address) = &args.grpc else {
        tracing::warn!("no --grpc: no router will find this worker");
        return;
    };
    let reporter = Reporter::start(address.clone(), Report::Worker(report(&args, &description, &load)));
    loop {
        // Either way it is time for the next report.
        drop(tokio::time::timeout(REPORT_PERIOD, load.changed.notified()).await);
        reporter.report(Report::Worker(report(&args, &description, &load)));
        tokio::time::sleep(REPORT_GAP).await;
    }
}

fn report(args: &WorkerArgs, description: &Description, load: &Load) -> WorkerLoad {
    let (active, queued, pending_tokens) = load.counts();
    let (prefill, decode) = load.rates();
    let count = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    WorkerLoad {
        name: args.name.clone(),
        role: description.role.into(),
        endpoint: description.endpoint.clone(),
        pid: std::process::id(),
        space: Some(manifest_to_wire(&description.manifest)),
        active_requests: count(active),
        queued_requests: count(queued),
        pending_tokens,
        requests_max: args.requests,
        prefill_tokens_per_second: prefill,
        decode_tokens_per_second: decode,
        context_tokens_max: u32::try_from(description.bounds.context).unwrap_or(u32::MAX),
        draining: load.is_draining(),
        model_path: description.model_path.clone(),
    }
}
