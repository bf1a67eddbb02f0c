-- Accepts tasks. ARGV per task:
--   id, digest, document, queue, delay_ms, not_before_ms, expires_ms, key, traceparent, tracestate.
-- Returns per task {verdict, id, limit}: new; known (this task stands already); conflict (another
-- does); full; too_large; unknown_queue;
-- unusable_queue (its key holds something else). Asking again with the same id is harmless.

local limit = limits()
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
  if not registered(queue) then
    return { 'unknown_queue', id }
  elseif not is_usable(queue) then
    return { 'unusable_queue', id }
  end
  if #document > limit.max_bytes then
    return { 'too_large', id, limit.max_bytes }
  end
  local waiting = length_of(queue) + redis.call('ZCARD', ready_of(queue))
    + redis.call('ZCARD', due_of(queue))
  if limit.max_length > 0 and waiting >= limit.max_length then
    return { 'full', id, limit.max_length }
  end
  local now = now_ms()
  redis.call('HSET', record_key(id), 'doc', document, 'digest', digest, 'queue', queue, 'accepted', int(now),
    'attempt', '1', 'key', key, 'traceparent', traceparent, 'tracestate', tracestate, 'expires', expires)
  redis.call('ZADD', OPEN, int(now), id)
  watch_expiry(id)
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
