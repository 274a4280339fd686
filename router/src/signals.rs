//! The two streams to the daemon: what the workers report, and what this router
//! reports. Both are taken up again for ever, with a growing pause.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use terrace_proto::v1;
use terrace_proto::v1::signal_service_client::SignalServiceClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::serve::Router;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// Channel to the daemon.
///
/// # Errors
/// If the address is none.
pub fn channel(grpc: &str) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(grpc.to_owned())?.connect_timeout(CONNECT_TIMEOUT);
    Ok(endpoint.http2_keep_alive_interval(Duration::from_secs(10)).connect_lazy())
}

/// Keeps the fleet up to date. Never ends; may be dropped at any time.
pub async fn observe(router: Arc<Router>, channel: Channel) {
    for_ever("cannot observe workers", || observe_once(&router, channel.clone())).await;
}

/// Reports prefill pressure. Never ends; may be dropped at any time.
pub async fn report(router: Arc<Router>, channel: Channel) {
    for_ever("cannot report to the daemon", || report_once(&router, channel.clone())).await;
}

async fn for_ever<F: Future<Output = Result<(), Status>>>(what: &str, mut once: impl FnMut() -> F) {
    let mut pause = PAUSE;
    let mut quiet = false;
    loop {
        let started = Instant::now();
        let result = once().await;
        if started.elapsed() > PAUSE_MAX {
            pause = PAUSE;
            quiet = false;
        }
        // One line an outage, not one an attempt.
        if !quiet {
            let reason =
                result.err().map_or("the stream ended".to_owned(), |status| status.message().to_owned());
            tracing::warn!(reason, "{what}; trying again until the daemon is back");
            quiet = true;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn observe_once(router: &Arc<Router>, channel: Channel) -> Result<(), Status> {
    let mut client = SignalServiceClient::new(channel);
    let mut stream = client.observe(v1::ObserveRequest {}).await?.into_inner();
    while let Some(reports) = stream.message().await? {
        let reader = Arc::clone(router);
        let workers = reports.workers.clone();
        let read = tokio::task::spawn_blocking(move || reader.models.read(&workers)).await;
        if let Err(error) = read {
            tracing::error!(%error, "reading a model's header failed");
        }
        router.fleet.observe(&reports, Instant::now());
    }
    Ok(())
}

async fn report_once(router: &Arc<Router>, channel: Channel) -> Result<(), Status> {
    let (reports, receiver) = mpsc::channel(1);
    let mut client = SignalServiceClient::new(channel);
    let send = async {
        loop {
            let pressure = router.pressure.report(&router.config.name, Instant::now());
            let report = v1::report_request::Report::Pressure(pressure);
            if reports.send(v1::ReportRequest { report: Some(report) }).await.is_err() {
                return Ok(());
            }
            tokio::time::sleep(REPORT_EVERY).await;
        }
    };
    let receive = async {
        let mut answers = client.report(ReceiverStream::new(receiver)).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
    };
    tokio::select! {
        result = send => result,
        result = receive => result,
    }
}
