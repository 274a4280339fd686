//! Whether the processes of a run answer.

use std::time::Duration;

use terrace_proto::v1::InfoRequest;
use terrace_proto::v1::admin_service_client::AdminServiceClient;

use crate::home::Running;

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest wait for one answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// Waits until the daemon answers; says which one it is. Cancel-safe.
pub(crate) async fn daemon(grpc: &str) -> String {
    loop {
        if let Ok(Some(text)) = tokio::time::timeout(ANSWER_TIME_MAX, ask_daemon(grpc)).await {
            return text;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn ask_daemon(grpc: &str) -> Option<String> {
    let mut client = AdminServiceClient::connect(grpc.to_owned()).await.ok()?;
    let info = client.info(InfoRequest {}).await.ok()?.into_inner();
    Some(format!("pid {}, life {}, ready within {} ms", info.pid, info.incarnation, info.ready_ms))
}

/// Waits until the planner says that its workers report, and the router lists a
/// model. Cancel-safe.
pub(crate) async fn front(running: &Running) -> String {
    let planner = running.planner_metrics.replace("/metrics", "/healthz");
    let models = format!("{}/v1/models", running.url);
    let health = format!("{}/healthz", running.url);
    loop {
        let planned = page(&planner).await.is_some();
        if planned && page(&health).await.is_some() {
            let served = page(&models).await.and_then(|text| first_model(&text));
            if let Some(model) = served {
                return format!("{model} is served");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn first_model(text: &str) -> Option<String> {
    let list: serde_json::Value = serde_json::from_str(text).ok()?;
    list["data"][0]["id"].as_str().map(str::to_owned)
}

/// The page's text when it answers with success.
async fn page(url: &str) -> Option<String> {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_TIME_MAX).build().ok()?;
    let answer = client.get(url).send().await.ok()?.error_for_status().ok()?;
    answer.text().await.ok()
}
