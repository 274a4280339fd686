//! `/metrics` and `/healthz`, plain HTTP on loopback.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::connections::{Gate, Gated, Patience};
use crate::lane::{Stop, stopped};
use crate::service::Service;
use crate::{health, metrics};

/// A connection that asks nothing for so long is closed: twice what most scrapers pause.
const IDLE: Duration = Duration::from_secs(60);

/// Serves until `stop`.
///
/// # Errors
/// The listener failed.
pub(crate) async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut stop: Stop,
) -> std::io::Result<()> {
    let most = service.facts().edges.connections;
    let gate =
        Gate::new("metrics_listen", most, Patience::Idle(IDLE), service.metrics().connections("metrics"));
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(async |State(service): State<Arc<Service>>| health::page(service.engine())))
        .with_state(service);
    axum::serve(Gated { listener, gate }, router)
        .with_graceful_shutdown(async move {
            stopped(&mut stop).await;
        })
        .await
}

async fn page(State(service): State<Arc<Service>>) -> impl IntoResponse {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    match metrics::page(service.engine(), service.metrics()) {
        Ok(text) => (StatusCode::OK, kind, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, kind, format!("{error}\n")),
    }
}
