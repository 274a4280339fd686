//! SignalService: the last report of every worker and router on the node.
//!
//! Promises: one report per reporter, by name; a reporter is forgotten when its
//! stream ends; observers get the state as it is, at most ten times a second, and
//! never a backlog. Limits: reporters, text lengths.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use terrace_proto::v1::report_request::Report;
use terrace_proto::v1::signal_service_server::SignalService;
use terrace_proto::v1::{
    ObserveRequest, ObserveResponse, PrefillPressure, ReportRequest, ReportResponse, WorkerLoad, WorkerRole,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Most reporters at once.
const REPORTERS_MAX: usize = 4096;
/// Longest name or address, in bytes.
const TEXT_BYTES_MAX: usize = 512;
/// Observers see changes no more often than this.
const OBSERVE_PERIOD: Duration = Duration::from_millis(100);

/// The reports.
#[derive(Clone)]
pub(crate) struct Signals {
    incarnation: u64,
    state: Arc<State>,
}

struct State {
    reports: Mutex<Reports>,
    changed: watch::Sender<u64>,
}

/// By name; the number tells a reporter's streams apart, so that a late end of an
/// old stream does not remove the report of a new one.
#[derive(Default)]
struct Reports {
    workers: BTreeMap<String, (u64, WorkerLoad)>,
    routers: BTreeMap<String, (u64, PrefillPressure)>,
    streams: u64,
}

impl Signals {
    /// No reports yet.
    pub(crate) fn new(incarnation: u64) -> Self {
        let state = State { reports: Mutex::default(), changed: watch::Sender::new(0) };
        Self { incarnation, state: Arc::new(state) }
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        // A panic elsewhere cannot leave the maps half-changed.
        self.state.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self) {
        self.state.changed.send_modify(|version| *version = version.wrapping_add(1));
    }

    fn current(&self) -> ObserveResponse {
        let reports = self.reports();
        ObserveResponse {
            incarnation: self.incarnation,
            workers: reports.workers.values().map(|(_, load)| load.clone()).collect(),
            pressures: reports.routers.values().map(|(_, pressure)| pressure.clone()).collect(),
        }
    }

    fn accept(&self, stream: &mut Reporter, report: Report) -> Result<(), Status> {
        let mut reports = self.reports();
        let name = check(&report)?;
        if stream.name.as_ref().is_some_and(|known| *known != name) {
            return Err(Status::invalid_argument(
                "a stream reports for one name; open another stream for another",
            ));
        }
        let known = reports.workers.contains_key(&name) || reports.routers.contains_key(&name);
        if !known && reports.workers.len() + reports.routers.len() >= REPORTERS_MAX {
            return Err(Status::resource_exhausted(format!(
                "{REPORTERS_MAX} reporters are registered, the limit"
            )));
        }
        stream.name = Some(name.clone());
        match report {
            Report::Worker(load) => drop(reports.workers.insert(name, (stream.id, load))),
            Report::Pressure(pressure) => drop(reports.routers.insert(name, (stream.id, pressure))),
        }
        drop(reports);
        self.touch();
        Ok(())
    }
}

fn check(report: &Report) -> Result<String, Status> {
    let (name, texts) = match report {
        Report::Worker(load) => {
            if load.role() == WorkerRole::Unspecified {
                return Err(Status::invalid_argument("role is missing: say PREFILL or DECODE"));
            }
            (&load.name, [load.endpoint.len(), load.model_path.len()])
        }
        Report::Pressure(pressure) => (&pressure.name, [0, 0]),
    };
    if name.is_empty() {
        return Err(Status::invalid_argument("name is empty; a reporter needs a unique name"));
    }
    // A path may be as long as the system allows.
    if name.len() > TEXT_BYTES_MAX || texts[0] > TEXT_BYTES_MAX || texts[1] > 8 * TEXT_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "a name or address is longer than {TEXT_BYTES_MAX} bytes"
        )));
    }
    Ok(name.clone())
}

/// One Report stream; its end removes the report.
struct Reporter {
    signals: Signals,
    id: u64,
    name: Option<String>,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        let Some(name) = &self.name else { return };
        let mut reports = self.signals.reports();
        if reports.workers.get(name).is_some_and(|(id, _)| *id == self.id) {
            reports.workers.remove(name);
        }
        if reports.routers.get(name).is_some_and(|(id, _)| *id == self.id) {
            reports.routers.remove(name);
        }
        drop(reports);
        self.signals.touch();
    }
}

#[tonic::async_trait]
impl SignalService for Signals {
    type ReportStream = Pin<Box<dyn Stream<Item = Result<ReportResponse, Status>> + Send>>;
    type ObserveStream = Pin<Box<dyn Stream<Item = Result<ObserveResponse, Status>> + Send>>;

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let mut incoming = request.into_inner();
        let id = {
            let mut reports = self.reports();
            reports.streams += 1;
            reports.streams
        };
        let mut reporter = Reporter { signals: self.clone(), id, name: None };
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(Ok(request)) = incoming.next().await {
                let Some(report) = request.report else { continue };
                let signals = reporter.signals.clone();
                let answer = signals
                    .accept(&mut reporter, report)
                    .map(|()| ReportResponse { incarnation: signals.incarnation });
                let refused = answer.is_err();
                if sender.send(answer).await.is_err() || refused {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn observe(
        &self,
        _request: Request<ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let signals = self.clone();
        let mut changes = self.state.changed.subscribe();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                changes.mark_unchanged();
                // A slow observer delays only itself: it gets the state of the time
                // at which there is room again.
                let Ok(room) = sender.reserve().await else { return };
                room.send(Ok(signals.current()));
                let changed = async {
                    tokio::time::sleep(OBSERVE_PERIOD).await;
                    changes.changed().await
                };
                tokio::select! {
                    ended = changed => if ended.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str) -> Report {
        let role = WorkerRole::Decode.into();
        Report::Worker(WorkerLoad { name: name.to_owned(), role, ..WorkerLoad::default() })
    }

    fn reporter(signals: &Signals, id: u64) -> Reporter {
        Reporter { signals: signals.clone(), id, name: None }
    }

    // A worker that reconnects opens its new stream before the daemon notices the
    // end of the old one; that end must not remove the new report.
    #[test]
    fn late_end_of_an_old_stream_keeps_the_new_report() {
        let signals = Signals::new(1);
        let (mut old, mut new) = (reporter(&signals, 1), reporter(&signals, 2));
        signals.accept(&mut old, load("decode-0")).unwrap();
        signals.accept(&mut new, load("decode-0")).unwrap();
        drop(old);
        assert_eq!(signals.current().workers.len(), 1);
        drop(new);
        assert!(signals.current().workers.is_empty(), "a reporter is forgotten when its stream ends");
    }

    // Reporters without end must not grow the table: one over the limit is refused.
    #[test]
    fn reporters_are_limited() {
        let signals = Signals::new(1);
        let mut streams = Vec::new();
        for id in 0..REPORTERS_MAX as u64 {
            let mut stream = reporter(&signals, id);
            signals.accept(&mut stream, load(&format!("decode-{id}"))).unwrap();
            streams.push(stream);
        }
        let refused = signals.accept(&mut reporter(&signals, u64::MAX), load("one too many")).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    }

    // A report without a name or a role says nothing that anybody could use.
    #[test]
    fn nameless_reports_are_refused() {
        let signals = Signals::new(1);
        let mut stream = reporter(&signals, 1);
        assert!(signals.accept(&mut stream, load("")).is_err());
        let roleless = Report::Worker(WorkerLoad { name: "x".to_owned(), ..WorkerLoad::default() });
        assert!(signals.accept(&mut stream, roleless).is_err());
    }
}
