-- Keeps the tail of one task's output, within a limit on all of them together.
-- ARGV: id, data, total bytes of the output, attempt, asked, retention_ms, limit of bytes.

local id, data = ARGV[1], ARGV[2]
local retention, limit = tonumber(ARGV[6]), tonumber(ARGV[7])
local TIMES, SIZES = BASE .. 'index:tails', BASE .. 'meta:tails'
local now = now_ms()

local function drop(other)
  local size = tonumber(redis.call('HGET', SIZES, other) or 0)
  redis.call('HDEL', SIZES, other)
  redis.call('ZREM', TIMES, other)
  redis.call('HINCRBY', SIZES, '', int(0 - size))
end

-- A look at a running task's output that comes late must not replace its end.
local kept = redis.call('HMGET', BASE .. 'tail:' .. id, 'attempt', 'total')
local attempt, total = tonumber(kept[1] or 0), tonumber(kept[2] or 0)
if attempt > tonumber(ARGV[4]) or (attempt == tonumber(ARGV[4]) and total > tonumber(ARGV[3])) then
  redis.call('HSET', BASE .. 'tail:' .. id, 'asked', ARGV[5])
  return {}
end

drop(id)
for _, other in ipairs(redis.call('ZRANGEBYSCORE', TIMES, '-inf', int(now - retention), 'LIMIT', 0, 100)) do
  drop(other)
end
while tonumber(redis.call('HGET', SIZES, '') or 0) + #data > limit do
  local oldest = redis.call('ZRANGE', TIMES, 0, 0)[1]
  if not oldest then
    data = '' -- it alone is over the limit
    break
  end
  drop(oldest)
  if redis.call('EXISTS', BASE .. 'tail:' .. oldest) == 1 then
    redis.call('HSET', BASE .. 'tail:' .. oldest, 'data', '')
  end
end
redis.call('HSET', BASE .. 'tail:' .. id, 'data', data, 'total', ARGV[3],
  'attempt', ARGV[4], 'asked', ARGV[5])
redis.call('PEXPIRE', BASE .. 'tail:' .. id, int(retention))
redis.call('ZADD', TIMES, int(now), id)
redis.call('HSET', SIZES, id, int(#data))
redis.call('HINCRBY', SIZES, '', #data)
return {}
