//! The OpenAI-compatible front door.
//!
//! A request passes [`http`] (routes, limits, shapes), becomes a [`generate`]
//! task, and is placed by [`place`], a pure function that minimises the
//! estimated time to the first token; before that it waits for its turn in
//! [`admit`]. [`fleet`] knows the workers, [`homes`] which daemon each works with,
//! [`index`] follows the daemons and knows what is cached, [`engines`] adds what
//! engines tell of their own caches, [`doors`] and [`publish`] tell other routers, and
//! [`models`] has the tokenizers. The router holds no state that it does not learn again within
//! seconds of a restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

pub mod admit;
pub mod caller;
pub mod config;
pub mod doors;
pub mod engines;
pub mod error;
pub mod explain;
pub mod fleet;
pub mod generate;
pub mod homes;
pub mod http;
pub mod index;
pub mod metrics;
pub mod models;
mod names;
pub mod place;
pub mod pressure;
pub mod publish;
mod random;
pub mod request;
pub mod response;
pub mod serve;
pub mod signals;
pub mod stop;
pub mod zmtp;

use config::Config;
use publish::Publisher;
use serve::Router;

/// How long running answers may take after SIGTERM.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Serves until SIGTERM or SIGINT; then takes nothing new and gives running
/// answers ten seconds to end.
///
/// # Errors
/// When the model file cannot be used, the port cannot be had, or signals cannot
/// be caught.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}; choose another --listen", config.listen))?;
    serve(config, listener, async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await
}

/// Serves on a listener until `stop` ends; see [`run`].
///
/// # Errors
/// When the model file cannot be used, or nothing can be published.
pub async fn serve(
    config: Config,
    listener: tokio::net::TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> anyhow::Result<()> {
    let router = Arc::new(Router::new(config)?);
    if let Some(publisher) =
        Publisher::start(&router).await.context("cannot listen for subscribers of events")?
    {
        let _ = router.publisher.set(publisher);
    }
    // Whoever waits for this line may use every door at once.
    let address = listener.local_addr().context("cannot tell the address listened on")?;
    tracing::info!(%address, daemons = router.config.grpc.join(","), "router listens");
    let observer = tokio::spawn(signals::follow(Arc::clone(&router)));
    let reporter = tokio::spawn(signals::report(Arc::clone(&router)));
    let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
    let routes = http::routes(router).into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
        stop.await;
        let _ = stopping.send(());
    });
    let overdue = async {
        let _ = stopped.await;
        tokio::time::sleep(DRAIN_TIME).await;
    };
    let result = tokio::select! {
        result = server.into_future() => result.context("the HTTP server failed"),
        () = overdue => {
            tracing::warn!("some answers were cut off: they took longer than {} s", DRAIN_TIME.as_secs());
            Ok(())
        }
    };
    observer.abort();
    reporter.abort();
    result
}
