//! `route explain`: where the router would send a prompt, and why.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::Target;
use crate::connect::router;
use crate::output::{self, Format};

/// Which prompt.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// The prompt, as plain text; or a request body, if the file holds a JSON object
    #[arg(long, value_name = "FILE")]
    prompt_file: PathBuf,
    /// The model [default: the only one there is]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The router, for example http://127.0.0.1:8080 [default: that of a running `terrace up`]
    #[arg(long, env = "TERRACE_ROUTER", value_name = "URL")]
    router: Option<String>,
}

pub(crate) async fn run(target: &Target, format: Format, options: &Options) -> anyhow::Result<ExitCode> {
    let text = std::fs::read_to_string(&options.prompt_file)
        .with_context(|| format!("cannot read {}", options.prompt_file.display()))?;
    let router = router(target, options.router.as_deref())?;
    let url = format!("{}/admin/explain", router.trim_end_matches('/'));
    let client = reqwest::Client::builder().no_proxy().build()?;
    let sent = client.post(&url).json(&body(&text, options.model.as_deref())).send().await;
    let response = sent.with_context(|| format!("cannot reach the router at {router}"))?;
    let status = response.status();
    let answer: Value = response
        .json()
        .await
        .with_context(|| format!("{router} is no router that explains: it answered {status}"))?;
    if !status.is_success() {
        bail!("the router refuses: {}", answer["error"]["message"].as_str().unwrap_or("without a reason"));
    }
    match format {
        Format::Json => output::json(&answer)?,
        Format::Table => print(&answer),
    }
    Ok(ExitCode::SUCCESS)
}

/// A request body as it is, or one around plain text.
fn body(text: &str, model: Option<&str>) -> Value {
    let given = serde_json::from_str::<Map<String, Value>>(text).ok();
    let mut body = given.unwrap_or_else(|| Map::from_iter([("prompt".to_owned(), json!(text))]));
    if let Some(model) = model {
        body.insert("model".to_owned(), json!(model));
    }
    Value::Object(body)
}

fn print(answer: &Value) {
    println!("{} tokens for {}", answer["prompt_tokens"], answer["model"].as_str().unwrap_or("?"));
    let ways = answer["ways"].as_array().map_or(&[][..], Vec::as_slice);
    if ways.is_empty() {
        println!("no decode worker is left; {} are full", answer["busy_decode_workers"]);
        return;
    }
    let mut table = output::table(&[
        "DECODE",
        "PREFILL",
        ">QUEUE",
        ">LOAD",
        ">COMPUTE",
        ">HANDOVER",
        ">TTFT",
        ">HARM",
        ">LOADED",
        ">MISSING",
    ]);
    for way in ways {
        let milliseconds = |term: &str| format!("{:.1}", way[term].as_f64().unwrap_or(f64::NAN) * 1e3);
        let full = if way["full"] == true { " (full)" } else { "" };
        table.add_row([
            format!("{}{full}", way["decode"].as_str().unwrap_or("?")),
            way["prefill"].as_str().unwrap_or("-").to_owned(),
            milliseconds("queue_seconds"),
            milliseconds("load_seconds"),
            milliseconds("prefill_seconds"),
            milliseconds("handover_seconds"),
            milliseconds("first_token_seconds"),
            milliseconds("harm_seconds"),
            way["loaded_tokens"].to_string(),
            way["missing_tokens"].to_string(),
        ]);
    }
    output::print(&table);
    println!("times in milliseconds; the first line is where it would go");
    for fetch in answer["fetches"].as_array().map_or(&[][..], Vec::as_slice) {
        println!(
            "loads tokens {} to {} from {}{}",
            fetch["begin_token"],
            fetch["end_token"],
            fetch["tier"].as_str().unwrap_or("?"),
            if fetch["prefetch"] == true { ", asked for in advance" } else { "" }
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text that looks like JSON but is none must stay a prompt, and a body must keep its fields.
    #[test]
    fn files_are_texts_or_bodies() {
        assert_eq!(body("{not json", None), json!({"prompt": "{not json"}));
        assert_eq!(body("[1, 2]", Some("m")), json!({"prompt": "[1, 2]", "model": "m"}));
        let chat = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
        assert_eq!(body(chat, None), serde_json::from_str::<Value>(chat).unwrap());
    }
}
