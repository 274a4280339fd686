//! The planner's loop: observe, decide, start and stop.
//!
//! One thread does everything, so that the kernel's parent-death signal, which
//! watches the spawning thread, means the death of the process.

use std::future::IntoFuture;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::http::StatusCode;
use terrace_proto::v1;
use terrace_proto::v1::signal_service_client::SignalServiceClient;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::config::Config;
use crate::fleet::{Action, Fleet};
use crate::local::{Connector, LocalProcesses};
use crate::metrics::Metrics;
use crate::process::Ask;
use crate::size::{Role, State, View, decide};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Longest pause between two attempts to reach the daemon.
const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT, then stops every worker. Decisions go to
/// stdout, one line each; logs go to stderr.
///
/// # Errors
/// When the metrics port cannot be had or signals cannot be caught.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let metrics = Metrics::new().context("cannot set up metrics")?;
    let health = Arc::new(Mutex::new("no worker has reported yet".to_owned()));
    let listener = tokio::net::TcpListener::bind(config.metrics_listen).await.with_context(|| {
        format!("cannot listen on {}; choose another --metrics-listen", config.metrics_listen)
    })?;
    let http =
        tokio::spawn(axum::serve(listener, routes(metrics.clone(), Arc::clone(&health))).into_future());
    let (reports_in, reports) = watch::channel(None);
    let observer = tokio::spawn(observe(config.grpc.clone(), reports_in));
    let planner = Planner {
        connector: LocalProcesses::new(config.workers.clone()),
        fleets: [
            Fleet::new(Role::Prefill, config.policy.prefill.max),
            Fleet::new(Role::Decode, config.policy.decode.max),
        ],
        state: State::default(),
        started: Instant::now(),
        config,
        metrics,
        health,
    };
    let result = planner.run(reports).await;
    observer.abort();
    http.abort();
    result
}

struct Planner<C> {
    config: Config,
    connector: C,
    fleets: [Fleet; 2],
    state: State,
    started: Instant,
    metrics: Metrics,
    health: Arc<Mutex<String>>,
}

const ROLES: [Role; 2] = [Role::Prefill, Role::Decode];

impl<C: Connector> Planner<C> {
    async fn run(mut self, reports: watch::Receiver<Option<v1::ObserveResponse>>) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let latest = reports.borrow().clone();
                    self.look(latest.as_ref());
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
        }
        tracing::info!("stopping the workers");
        while !self.wind_down() {
            ticks.tick().await;
        }
        Ok(())
    }

    /// One look: note exits, decide, act.
    fn look(&mut self, reports: Option<&v1::ObserveResponse>) {
        let now = self.started.elapsed();
        self.note_exits(now);
        // Without the daemon there is no view: the present numbers stay.
        let blind =
            reports.is_none() && self.state.wanted(Role::Prefill) + self.state.wanted(Role::Decode) > 0;
        if !blind {
            let view = reports.map(View::from_reports).unwrap_or_default();
            for decision in decide(&view, now, &mut self.state, &self.config.policy) {
                self.metrics.decided(decision.role);
                say(&decision.to_string());
            }
        }
        for (index, role) in ROLES.into_iter().enumerate() {
            let wanted = self.state.wanted(role);
            self.act(index, role, wanted, now);
            self.metrics.fleet(role, wanted, self.fleets[index].running());
        }
        let health = self.judge(reports);
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    fn note_exits(&mut self, now: Duration) {
        for exit in self.connector.exited() {
            for (index, role) in ROLES.into_iter().enumerate() {
                if let Some(pause) = self.fleets[index].exited(&exit.name, now) {
                    self.metrics.exited(role);
                    say(&format!(
                        "{} {}; starting it again in {:.1} s",
                        exit.name,
                        exit.how,
                        pause.as_secs_f64()
                    ));
                }
            }
        }
    }

    fn act(&mut self, index: usize, role: Role, wanted: u32, now: Duration) {
        for action in self.fleets[index].reconcile(wanted, now) {
            match action {
                Action::Start(name) => {
                    self.metrics.started(role);
                    tracing::info!(worker = name, "starting");
                    if let Err(error) = self.connector.start(role, &name) {
                        let pause = self.fleets[index].exited(&name, now).unwrap_or_default();
                        say(&format!(
                            "{name} did not start: {error}; next attempt in {:.1} s",
                            pause.as_secs_f64()
                        ));
                    }
                }
                Action::Stop(name) => {
                    tracing::info!(worker = name, "draining");
                    self.connector.stop(&name, Ask::Stop);
                }
                Action::Kill(name) => {
                    say(&format!("{name} did not drain in time: killed"));
                    self.connector.stop(&name, Ask::Die);
                }
            }
        }
    }

    /// Stops everything; answers whether all are gone.
    fn wind_down(&mut self) -> bool {
        let now = self.started.elapsed();
        self.note_exits(now);
        for (index, role) in ROLES.into_iter().enumerate() {
            self.act(index, role, 0, now);
        }
        self.fleets.iter().all(Fleet::is_empty)
    }

    /// Empty when as many workers of each role report as there must be at least.
    fn judge(&self, reports: Option<&v1::ObserveResponse>) -> String {
        let Some(reports) = reports else {
            return format!("the daemon at {} does not answer", self.config.grpc);
        };
        let view = View::from_reports(reports);
        let policy = &self.config.policy;
        let roles = [
            (Role::Prefill, view.prefill.workers, policy.prefill.min),
            (Role::Decode, view.decode.workers, policy.decode.min),
        ];
        let short = roles.into_iter().filter(|(_, workers, min)| workers < min);
        let texts: Vec<_> =
            short.map(|(role, workers, min)| format!("{role}: {workers} of {min} report")).collect();
        texts.join(", ")
    }
}

/// One line for the operator. A closed stdout is no reason to stop working.
fn say(line: &str) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        tracing::info!("{line}");
    }
}

fn routes(metrics: Metrics, health: Arc<Mutex<String>>) -> axum::Router {
    let page = move || async move { metrics.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR) };
    let healthz = move || async move {
        let text = health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if text.is_empty() {
            (StatusCode::OK, "ok".to_owned())
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
    };
    axum::Router::new()
        .route("/metrics", axum::routing::get(page))
        .route("/healthz", axum::routing::get(healthz))
}

/// Keeps `reports` at the daemon's latest word; `None` while it does not answer.
async fn observe(grpc: String, reports: watch::Sender<Option<v1::ObserveResponse>>) {
    let mut pause = Duration::from_millis(100);
    loop {
        match follow(&grpc, &reports).await {
            Ok(()) => tracing::info!("the daemon ended the signal stream"),
            Err(error) => tracing::debug!(%error, "no signals from the daemon"),
        }
        if reports.send_replace(None).is_some() {
            tracing::warn!("the daemon at {grpc} is away; the number of workers stays as it is");
            pause = Duration::from_millis(100);
        }
        tokio::time::sleep(pause).await;
        pause = pause.saturating_mul(2).min(RECONNECT_MAX);
    }
}

async fn follow(grpc: &str, reports: &watch::Sender<Option<v1::ObserveResponse>>) -> anyhow::Result<()> {
    let mut client = SignalServiceClient::connect(grpc.to_owned()).await?;
    let mut stream = client.observe(v1::ObserveRequest {}).await?.into_inner();
    while let Some(report) = stream.message().await? {
        reports.send_replace(Some(report));
    }
    Ok(())
}
