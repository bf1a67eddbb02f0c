-- Accepts tasks. ARGV per task:
--   id, digest, document, queue, delay_ms, not_before_ms, expires_ms, key, traceparent, tracestate.
-- Returns per task {verdict, id, limit}: new; known (this task stands already); conflict (another
-- does); or why its queue takes no task. Asking again with the same id is harmless.

local FIELDS = 10

local function standing(id, digest)
  local other = redis.call('HGET', record_key(id), 'digest')
  if not other and redis.call('EXISTS', record_key(id)) == 0 then
    return nil
  end
  if other == digest then
    return { 'known', id }
  end
  return { 'conflict', id }
end

local function accept(id, digest, document, queue, delay, not_before, expires, key, traceparent, tracestate)
  if key ~= '' then
    local holder = redis.call('GET', BASE .. 'key:' .. key)
    local verdict = holder and standing(holder, digest)
    if verdict then
      return verdict
    end
  end
  local verdict = standing(id, digest)
  if verdict then
    return verdict
  end
  local refused, limit = refusal_of(queue, document)
  if refused then
    return { refused, id, limit }
  end
  local now = record(id, document, digest, queue, expires,
    { 'key', key, 'traceparent', traceparent, 'tracestate', tracestate })
  if key ~= '' then
    redis.call('SET', BASE .. 'key:' .. key, id)
  end
  local due = math.max(tonumber(not_before), now + tonumber(delay))
  if due > now then
    schedule(id, due)
  else
    append(id, queue)
  end
  return { 'new', id }
end

local answers = {}
for i = 1, #ARGV, FIELDS do
  answers[#answers + 1] = accept(unpack(ARGV, i, i + FIELDS - 1))
end
return answers
