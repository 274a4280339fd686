//! A worker process: the engine behind gRPC, its blocks in the store.

mod args;
mod compute;
mod device;
mod load;
mod report;
mod rpc;
mod sequence;
mod store;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use terrace_core::Purpose;
use terrace_core::{ByteCount, SpaceKind, SpaceManifest, TokenCount};
use terrace_proto::MESSAGE_BYTES_MAX;
use terrace_proto::v1::WorkerRole;
use terrace_proto::v1::worker_service_server::WorkerServiceServer;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

pub use args::{Cli, Role, WorkerArgs};
use compute::Compute;
use device::StoreDevice;
use load::Load;
use rpc::{Bounds, Worker};
use sequence::Shared;
use store::Store;

use crate::kv::{BLOCK_TOKENS, LAYOUT};
use crate::model::{ARITHMETIC, Engine, Model, ModelOptions};

/// Time that callers have to take back what a leaving worker did not finish.
const GIVE_BACK: Duration = Duration::from_secs(1);

/// Runs a worker until SIGTERM, SIGINT or a call of `Drain`; then lets running
/// requests end, and gives back those that take too long.
///
/// # Errors
/// If the model cannot be opened or an address cannot be served.
pub async fn run(role: WorkerRole, args: WorkerArgs) -> anyhow::Result<()> {
    let engine = open_engine(&args).await?;
    let model = engine.model();
    let load = Arc::new(Load::new()?);
    let requests = usize::try_from(args.requests).context("too many requests for this machine")?;
    let manifest = manifest(&engine)?;
    let compute = Compute::start(engine.clone(), Arc::clone(&load), requests)?;
    let purpose = match role {
        WorkerRole::Decode => Purpose::Decode,
        WorkerRole::Prefill | WorkerRole::Unspecified => Purpose::Prefill,
    };
    let device = StoreDevice::open(args.device, &engine)?;
    let store = Store::new(&args, &manifest, purpose, device)?;
    let shared = Arc::new(Shared {
        compute,
        store: store.clone(),
        load: Arc::clone(&load),
        geometry: model.geometry(),
    });
    let bounds = Bounds {
        context: model.shape().context,
        vocabulary: model.shape().vocabulary,
        requests,
        drain: Duration::from_secs(args.drain_seconds),
    };

    let listener = bind(args.listen, "--listen").await?;
    let address = listener.local_addr()?;
    let metrics_listener = bind(args.metrics_listen, "--metrics-listen").await?;
    let metrics_address = metrics_listener.local_addr()?;
    let description = report::Description {
        role,
        endpoint: format!("http://{address}"),
        manifest,
        bounds,
        model_path: std::path::absolute(&args.model)?.to_string_lossy().into_owned(),
    };
    let reporter = tokio::spawn(report::run(args.clone(), description, Arc::clone(&load)));
    let metrics = tokio::spawn(serve_metrics(metrics_listener, Arc::clone(&load)));
    tracing::info!(name = args.name, %address, metrics = %metrics_address, "worker ready");

    serve(listener, Worker::new(shared, bounds), &load, bounds.drain).await?;
    reporter.abort();
    metrics.abort();
    store.close().await;
    tracing::info!(name = args.name, "worker stopped");
    Ok(())
}

async fn open_engine(args: &WorkerArgs) -> anyhow::Result<Engine> {
    let path = args.model.clone();
    let mut options = ModelOptions::detect();
    if args.threads > 0 {
        options.threads = args.threads;
    }
    let opened = tokio::task::spawn_blocking(move || Model::open_with(&path, options)).await?;
    let model = opened.with_context(|| format!("cannot use the model {}", args.model.display()))?;
    let device = args.device;
    let engine = tokio::task::spawn_blocking(move || Engine::new(Arc::new(model), device)).await?;
    let engine =
        engine.with_context(|| format!("cannot compute on {device}; `--device cpu` always works"))?;
    tracing::info!(model = engine.model().name(), computes = engine.describe(), "model opened");
    if engine.arithmetic() != ARITHMETIC {
        tracing::warn!(
            "this device gives other bits than the processor: its blocks are in a space of their own"
        );
    }
    Ok(engine)
}

/// What this engine's blocks are. Workers of other instruction sets share them, and
/// so do those on devices that were tried: all compute the same bits.
fn manifest(engine: &Engine) -> anyhow::Result<SpaceManifest> {
    let model = engine.model();
    Ok(SpaceManifest {
        model: model.name().to_owned(),
        model_fingerprint: model.fingerprint().as_bytes().to_vec(),
        weights_generation: 0,
        dtype: "f16".to_owned(),
        layout: LAYOUT.to_owned(),
        tokens_per_block: TokenCount::new(u32::try_from(BLOCK_TOKENS)?),
        block_bytes: ByteCount::new(u64::try_from(model.geometry().block_bytes())?),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".to_owned(),
        rank: 0,
        engine: engine.arithmetic().to_owned(),
    })
}

async fn bind(address: SocketAddr, option: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve on {address}; choose another address with {option}"))
}

async fn serve(
    listener: TcpListener,
    worker: Worker,
    load: &Arc<Load>,
    drain: Duration,
) -> anyhow::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<WorkerServiceServer<Worker>>().await;
    let service = WorkerServiceServer::new(worker)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let draining = Arc::clone(load);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        draining.drain(Instant::now() + drain);
    });
    let stopping = Arc::clone(load);
    let mut server = tokio::spawn(
        Server::builder().add_service(health_service).add_service(service).serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            async move {
                stopping.drained().await;
                tracing::info!("stopping: running requests end first");
            },
        ),
    );
    let overdue = async {
        load.left().await;
        tracing::info!("the time is over: running requests are given back");
        tokio::time::sleep(GIVE_BACK).await;
    };
    tokio::select! {
        ended = &mut server => ended??,
        () = overdue => {
            tracing::warn!("some callers did not take their requests back; they are cut off");
            server.abort();
        }
    }
    Ok(())
}

async fn serve_metrics(listener: TcpListener, load: Arc<Load>) -> std::io::Result<()> {
    let text = move || {
        let load = Arc::clone(&load);
        async move {
            match load.text() {
                Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }
        }
    };
    let app = Router::new().route("/metrics", get(text)).route("/healthz", get(|| async { "ok\n" }));
    axum::serve(listener, app).await
}
