//! `/metrics` and `/healthz`, plain HTTP on loopback.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::lane::{Stop, stopped};
use crate::service::Service;
use crate::{health, metrics};

/// Serves until `stop`.
///
/// # Errors
/// The listener failed.
pub(crate) async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut stop: Stop,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(async |State(service): State<Arc<Service>>| health::page(service.engine())))
        .with_state(service);
    axum::serve(listener, router)
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
