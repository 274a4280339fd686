//! Load and pressure reports: telling them, and following everybody's.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::WatchStream;
use tonic::Streaming;

use terrace_proto::MESSAGE_BYTES_MAX;
use terrace_proto::v1::report_request::Report as Wire;
use terrace_proto::v1::signal_service_client::SignalServiceClient;
use terrace_proto::v1::{ObserveRequest, ObserveResponse, PrefillPressure, ReportRequest, WorkerLoad};

use crate::channel::channel;
use crate::error::ClientError;

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What a reporter tells.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one exists at a time, on its way to the wire")]
pub enum Report {
    /// Load of a worker.
    Worker(WorkerLoad),
    /// Pressure that a router sees.
    Pressure(PrefillPressure),
}

impl From<Report> for ReportRequest {
    fn from(report: Report) -> Self {
        let report = match report {
            Report::Worker(load) => Wire::Worker(load),
            Report::Pressure(pressure) => Wire::Pressure(pressure),
        };
        Self { report: Some(report) }
    }
}

/// Keeps one reporter registered with a daemon for as long as it lives, through
/// the daemon's restarts. The daemon forgets it when this is dropped.
#[derive(Debug)]
pub struct Reporter {
    latest: watch::Sender<ReportRequest>,
    connected: watch::Receiver<bool>,
    task: AbortHandle,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reporter {
    /// Starts reporting to the daemon at `address`, in the background. Call it
    /// inside a tokio runtime.
    pub fn start(address: impl Into<String>, report: Report) -> Self {
        let (latest, reports) = watch::channel(report.into());
        let (connecting, connected) = watch::channel(false);
        let task = tokio::spawn(keep_reporting(address.into(), reports, connecting)).abort_handle();
        Self { latest, connected, task }
    }

    /// Replaces the last report. Reports that come faster than they can be sent
    /// are skipped, the latest one never.
    pub fn report(&self, report: Report) {
        self.latest.send_replace(report.into());
    }

    /// Whether the daemon has answered since the last connection.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }
}

async fn keep_reporting(
    address: String,
    reports: watch::Receiver<ReportRequest>,
    connecting: watch::Sender<bool>,
) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let error = match report_once(&address, reports.clone(), &connecting).await {
            Ok(()) => "the daemon ended the stream".to_owned(),
            Err(error) => error.to_string(),
        };
        if connecting.send_replace(false) {
            backoff = BACKOFF_MIN;
            tracing::info!(error, "reports are interrupted");
        }
        tokio::time::sleep(backoff).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn report_once(
    address: &str,
    reports: watch::Receiver<ReportRequest>,
    connecting: &watch::Sender<bool>,
) -> Result<(), ClientError> {
    let mut client = SignalServiceClient::new(channel(address).await?);
    let mut answers = client.report(WatchStream::new(reports)).await?.into_inner();
    while answers.message().await?.is_some() {
        connecting.send_replace(true);
    }
    Ok(())
}

/// Everybody's reports, as one daemon knows them.
#[derive(Debug)]
pub struct Observer {
    stream: Streaming<ObserveResponse>,
}

/// Streams the reports known to the daemon at `address`: all of them now, and
/// all of them whenever one changes.
///
/// # Errors
/// Nobody answers there.
pub async fn observe(address: &str) -> Result<Observer, ClientError> {
    let mut client =
        SignalServiceClient::new(channel(address).await?).max_decoding_message_size(MESSAGE_BYTES_MAX);
    Ok(Observer { stream: client.observe(ObserveRequest {}).await?.into_inner() })
}

impl Observer {
    /// The next set of reports; `None` when the daemon ends. Cancel-safe.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<ObserveResponse>, ClientError> {
        Ok(self.stream.message().await?)
    }
}

/// The latest reports, followed in the background through the daemon's restarts.
#[derive(Debug)]
pub struct Follower {
    latest: watch::Receiver<ObserveResponse>,
    task: AbortHandle,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Starts following. Until the daemon answers, and while it is away, there
    /// are no reports. Call it inside a tokio runtime.
    pub fn start(address: impl Into<String>) -> Self {
        let (reports, latest) = watch::channel(ObserveResponse::default());
        let task = tokio::spawn(keep_following(address.into(), reports)).abort_handle();
        Self { latest, task }
    }

    /// The latest reports. To wait for a change, use the receiver's `changed`.
    pub fn reports(&self) -> watch::Receiver<ObserveResponse> {
        self.latest.clone()
    }
}

async fn keep_following(address: String, reports: watch::Sender<ObserveResponse>) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let following = async {
            let mut observer = observe(&address).await?;
            while let Some(seen) = observer.next().await? {
                reports.send_replace(seen);
            }
            Ok::<(), ClientError>(())
        };
        if let Err(error) = following.await {
            tracing::debug!(%error, "reports cannot be followed");
        }
        let before = reports.send_replace(ObserveResponse::default());
        backoff =
            if before == ObserveResponse::default() { (backoff * 2).min(BACKOFF_MAX) } else { BACKOFF_MIN };
        tokio::time::sleep(backoff).await;
    }
}
