//! Asks the front door and takes the time.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Longest time for one answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// A streamed answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// Time until the first text arrived.
    pub(super) first: Duration,
    /// All of the text.
    pub(super) text: String,
    /// Tokens of the prompt, as counted by the router.
    pub(super) prompt_tokens: u64,
    /// Of those, from the cache.
    pub(super) cached_tokens: u64,
}

/// One HTTP client for a whole suite.
pub(super) fn client() -> anyhow::Result<reqwest::Client> {
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_TIME_MAX).tcp_nodelay(true).build();
    client.context("cannot set up an HTTP client")
}

/// Asks for a greedy continuation of `tokens`, streamed.
///
/// # Errors
/// When the answer is an error or breaks off.
pub(super) async fn ask(
    client: &reqwest::Client,
    url: &str,
    tokens: &[u32],
    tokens_max: u32,
) -> anyhow::Result<Answer> {
    let body = json!({
        "prompt": tokens, "max_tokens": tokens_max, "temperature": 0, "stream": true,
        "stream_options": { "include_usage": true },
    });
    let began = Instant::now();
    let mut answer = client.post(format!("{url}/v1/completions")).json(&body).send().await?;
    if !answer.status().is_success() {
        let status = answer.status();
        bail!("the router answered {status}: {}", answer.text().await.unwrap_or_default());
    }
    let mut reading = Reading::default();
    while let Some(piece) = answer.chunk().await? {
        reading.take(&piece, began)?;
    }
    if !reading.done {
        bail!("the answer broke off after {:?}", reading.text);
    }
    Ok(Answer {
        first: reading.first.context("the answer has no text")?,
        text: reading.text,
        prompt_tokens: reading.usage["prompt_tokens"].as_u64().context("the answer has no usage")?,
        cached_tokens: reading.usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0),
    })
}

/// Server-sent events as they come in.
#[derive(Default)]
struct Reading {
    pending: Vec<u8>,
    first: Option<Duration>,
    text: String,
    usage: Value,
    done: bool,
}

impl Reading {
    fn take(&mut self, piece: &[u8], began: Instant) -> anyhow::Result<()> {
        self.pending.extend_from_slice(piece);
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            let data = data.trim_ascii_end();
            if data == b"[DONE]" {
                self.done = true;
                continue;
            }
            let event: Value =
                serde_json::from_slice(data).context("the router sent an event that is no JSON")?;
            if event["error"].is_object() {
                bail!("the router ended the answer: {}", event["error"]["message"]);
            }
            if let Some(text) = event["choices"][0]["text"].as_str()
                && !text.is_empty()
            {
                self.first.get_or_insert_with(|| began.elapsed());
                self.text.push_str(text);
            }
            if event["usage"].is_object() {
                self.usage = event["usage"].clone();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events arrive cut anywhere; text or usage must not get lost at a cut.
    #[test]
    fn events_cut_anywhere_are_read_whole() {
        let stream =
            b"data: {\"choices\":[{\"text\":\"Pa\"}]}\n\ndata: {\"choices\":[{\"text\":\"ris\"}]}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7}}\n\ndata: [DONE]\n\n";
        for cut in 0..stream.len() {
            let mut reading = Reading::default();
            reading.take(&stream[..cut], Instant::now()).unwrap();
            reading.take(&stream[cut..], Instant::now()).unwrap();
            assert_eq!((reading.text.as_str(), reading.done), ("Paris", true));
            assert_eq!(reading.usage["prompt_tokens"], 7);
        }
    }
}
